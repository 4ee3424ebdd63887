"""Arguments as tables, positionals numbered and flags named, and the one parser that reads a command line.

A refused command ends here, so nothing is imported that Python's own start-up has not imported already.
"""

from collections.abc import Callable, Mapping, Sequence

IGNORED = "ignored"  # what a flag means that changes nothing
SLIPPED = 3  # wrong values in one command line that are no coincidence


class UsageError(ValueError):
    """What the user typed cannot be run; the message says what, its value, what is allowed."""


class Arg:
    """One argument: its name, how its text becomes a value, and in words what is allowed.

    `parse` raises ValueError for text that is not allowed. A `default` makes a trailing positional optional, and is
    the value of an environment variable that is not set. A flag of a script that people edit `means` the argument that
    other launchers have in a place of its own; it may be said again, and the last time counts.
    """

    __slots__ = ("allowed", "default", "means", "name", "parse")

    def __init__(
        self, name: str, parse: Callable[[str], object], allowed: str, default: str | None = None, means: str = ""
    ) -> None:
        self.name, self.parse, self.allowed, self.default, self.means = name, parse, allowed, default, means or name


class Switch(Arg):
    """A flag that may stand alone, and then means true."""

    __slots__ = ()


class Several(Arg):
    """A flag that several values may follow; their text has one on each line."""

    __slots__ = ()


Table = tuple[Arg, ...]


def divide(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positionals, and the options that begin with the first `--flag`."""
    first = next((i for i, text in enumerate(argv) if text.startswith("--")), len(argv))
    return list(argv[:first]), list(argv[first:])


def choose(tables: Sequence[Table], given: Sequence[str]) -> Table:
    """The first of `tables` that `given` fits: by count, and by value where one fits. Raises UsageError for none."""
    fitting = [table for table in tables if len(given) in counts(table)]
    if not fitting:
        allowed = sorted({count for table in tables for count in counts(table)})
        is_range = allowed == list(range(allowed[0], allowed[-1] + 1))
        ends = dict.fromkeys((allowed[0], allowed[-1])) if is_range else allowed
        wanted = (" to " if is_range else " or ").join(map(str, ends))
        raise UsageError(f"{wanted} arguments are needed, {len(given)} were given\n{numbered(tables[0], given)}")
    return next((table for table in fitting if not _wrong(table, given)), fitting[0])


def counts(table: Table) -> range:
    """How many arguments `table` takes: those with a default may be left out."""
    return range(sum(arg.default is None for arg in table), len(table) + 1)


def read(table: Table, given: Sequence[str]) -> dict[str, object]:
    """Name → value of every positional; `given` has a valid length. Raises UsageError for all wrong values together.

    As many as a slip by one place makes are shown with the numbered table.
    """
    wrong = _wrong(table, given)
    if len(wrong) >= SLIPPED:
        wrong.append(f"{len(wrong)} arguments look as if they stood in another's place:\n{numbered(table, given)}")
    if wrong:
        raise UsageError("\n".join(wrong))
    return {arg.name: arg.parse(text) for arg, text in zip(table, typed(table, given).values(), strict=True)}


def _wrong(table: Table, given: Sequence[str]) -> list[str]:
    sentences = []
    for number, (arg, text) in enumerate(zip(table, typed(table, given).values(), strict=True), 1):
        try:
            arg.parse(text)
        except ValueError:
            sentences.append(f"argument {number} ({arg.name}) is {text!r}; allowed: {arg.allowed}")
    return sentences


def read_flags(table: Table, argv: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """Name → value of the `--flags` in `table`, and the options that are not in it.

    Raises UsageError for all that are missing or have wrong values together, and for a text that follows no flag.
    """
    texts, others = _flag_texts(table, argv)
    values, wrong = {}, []
    for arg in table:
        text = texts.get(arg.name, arg.default)
        try:
            if text is None:
                wrong.append(f"{arg.name} is missing; allowed: {arg.allowed}")
            else:
                values[arg.means] = arg.parse(text)
        except ValueError:
            wrong.append(f"{arg.name} is {text!r}; allowed: {arg.allowed}")
    if wrong:
        raise UsageError("\n".join(wrong))
    return values, others


def _flag_texts(table: Table, argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    flags, texts, others, rest = {arg.name: arg for arg in table}, {}, [], list(argv)
    while rest:
        name, has_value, text = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise UsageError(f"{name!r} follows no flag; the flags are {', '.join(flags)}")
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if name not in flags:
            others += [name + has_value + text, *values]
            continue
        values = [text] if has_value else values
        if isinstance(flags[name], Switch) and not values:
            values = ["true"]
        if isinstance(flags[name], Several) and values:
            values = ["\n".join(values)]
        is_again = name in texts and flags[name].means == name
        if len(values) != 1 or is_again:
            told = "given twice" if is_again else f"followed by {len(values)} values, not one"
            raise UsageError(f"{name} is {told}; allowed: {flags[name].allowed}")
        texts[name] = values[0]
    return texts, others


def typed(table: Table, given: Sequence[str]) -> dict[str, str]:
    """Name → text, optional arguments filled in. `given` has a valid length."""
    texts = [*given, *(arg.default for arg in table[len(given) :])]
    return {arg.name: text for arg, text in zip(table, texts, strict=True)}


def read_variables(table: Table, environ: Mapping[str, str]) -> dict[str, object]:
    """Name → value of the environment variables in `table`. Raises UsageError for all wrong ones together."""
    values, wrong = {}, []
    for arg in table:
        text = environ.get(arg.name, "") or arg.default or ""
        try:
            values[arg.name] = arg.parse(text)
        except ValueError:
            wrong.append(f"environment variable {arg.name} is {text!r}; allowed: {arg.allowed}")
    if wrong:
        raise UsageError("\n".join(wrong))
    return values


def numbered(table: Table, given: Sequence[str]) -> str:
    """What was received, one line per place, with (missing) and (extra) marks."""
    names = [arg.name for arg in table] + ["(extra)"] * (len(given) - len(table))
    width = max(map(len, names))
    lines = []
    for number, name in enumerate(names, 1):
        if number <= len(given):
            text = repr(given[number - 1])
        elif table[number - 1].default is None:
            text = f"(missing)  {table[number - 1].allowed}"
        else:
            text = f"(optional) {table[number - 1].allowed}"
        lines.append(f"  {number:3d}  {name:{width}}  {text}")
    return "\n".join(lines)


def place(table: Table, name: str) -> str:
    """How a message names an argument: `argument 10 (TP)`, `--load-dir`, or the environment variable."""
    names = [arg.name for arg in table]
    flag = next((arg.name for arg in table if name in (arg.name, arg.means) and arg.name.startswith("--")), None)
    if flag is not None or name.startswith("--"):
        return flag or name
    return f"argument {names.index(name) + 1} ({name})" if name in names else f"environment variable {name}"


class Request:
    """One checked command line: values of arguments and variables together, texts as typed, what follows them.

    `families`, `format`, `flags` and `title` are the launcher's, and so are the values of what its table leaves out.
    """

    __slots__ = ("environ", "families", "flags", "format", "is_dry", "options", "table", "texts", "title", "values")

    def __init__(
        self,
        table: Table,
        values: Mapping[str, object],
        texts: Mapping[str, str],
        options: list[str],
        environ: Mapping[str, str],
        families: tuple[str, ...] = (),
        is_dry: bool = False,
        format: str = "",
        flags: tuple[str, ...] = (),
        title: str = "",
    ) -> None:
        self.table, self.values, self.texts, self.options = table, values, texts, options
        self.environ, self.families, self.is_dry, self.format = environ, families, is_dry, format
        self.flags, self.title = flags, title

    def changed(self, values: Mapping[str, object], options: list[str]) -> "Request":
        """The same command line with other values, and other options behind it."""
        return Request(
            *(self.table, values, self.texts, options, self.environ, self.families, self.is_dry),
            *(self.format, self.flags, self.title),
        )

    def where(self, name: str) -> str:
        """How a message names the argument or variable `name`."""
        return place(self.table, name)

    def arguments(self) -> dict[str, object]:
        """Name → value of the arguments alone, without variables."""
        return {arg.name: self.values[arg.means] for arg in self.table if arg.means != IGNORED}
