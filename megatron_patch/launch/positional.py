"""Positional arguments as numbered tables, and the one parser that reads a command line against them.

A refused command ends here, so nothing is imported that Python's own start-up has not imported already.
"""

from collections.abc import Callable, Mapping, Sequence


class UsageError(ValueError):
    """What the user typed cannot be run; the message says what, its value, what is allowed."""


class Arg:
    """One argument: its name, how its text becomes a value, and in words what is allowed.

    `parse` raises ValueError for text that is not allowed. A `default` makes a trailing positional optional, and is
    the value of an environment variable that is not set.
    """

    __slots__ = ("allowed", "default", "name", "parse")

    def __init__(self, name: str, parse: Callable[[str], object], allowed: str, default: str | None = None) -> None:
        self.name, self.parse, self.allowed, self.default = name, parse, allowed, default


Table = tuple[Arg, ...]


def divide(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positionals, and the options that begin with the first `--flag`."""
    first = next((i for i, text in enumerate(argv) if text.startswith("--")), len(argv))
    return list(argv[:first]), list(argv[first:])


def read(table: Table, given: Sequence[str]) -> dict[str, object]:
    """Name → value of every positional. Raises UsageError for a wrong count, and for all wrong values together."""
    least = sum(arg.default is None for arg in table)
    if not least <= len(given) <= len(table):
        wanted = f"{least}" if least == len(table) else f"{least} to {len(table)}"
        raise UsageError(f"{wanted} arguments are needed, {len(given)} were given\n{numbered(table, given)}")
    values, wrong = {}, []
    for number, (arg, text) in enumerate(zip(table, typed(table, given).values(), strict=True), 1):
        try:
            values[arg.name] = arg.parse(text)
        except ValueError:
            wrong.append(f"argument {number} ({arg.name}) is {text!r}; allowed: {arg.allowed}")
    if wrong:
        raise UsageError("\n".join(wrong))
    return values


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
    """How a message names an argument: `argument 10 (TP)`, or the environment variable."""
    names = [arg.name for arg in table]
    return f"argument {names.index(name) + 1} ({name})" if name in names else f"environment variable {name}"


class Request:
    """One checked command line: values of positionals and variables together, texts as typed, what follows them."""

    __slots__ = ("environ", "families", "is_dry", "options", "table", "texts", "values")

    def __init__(
        self,
        table: Table,
        values: Mapping[str, object],
        texts: Mapping[str, str],
        options: list[str],
        environ: Mapping[str, str],
        families: tuple[str, ...] = (),
        is_dry: bool = False,
    ) -> None:
        self.table, self.values, self.texts, self.options = table, values, texts, options
        self.environ, self.families, self.is_dry = environ, families, is_dry

    def arguments(self) -> dict[str, object]:
        """Name → value of the positionals alone."""
        return {arg.name: self.values[arg.name] for arg in self.table}
