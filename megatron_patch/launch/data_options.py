"""Megatron's options that name datasets, as the trainer's own two: `--train-data-path` and `--valid-data-path`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_patch.data.paths import parse_blend, split_words
from megatron_patch.launch.positional import Request, UsageError

TRAIN, VALID, TEST = OF_SPLITS = ("--train-data-path", "--valid-data-path", "--test-data-path")
TOGETHER, FILE, FILE_OF_SPLITS = "--data-path", "--data-args-path", "--per-split-data-args-path"
DATA_OPTIONS = (TOGETHER, FILE, FILE_OF_SPLITS, TEST)  # that the trainer does not know
Words = tuple[str, ...]


def with_data_options(request: Request) -> tuple[Request, list[str]]:
    """`request` with its datasets named in the trainer's options alone, and a note on what has no effect.

    `--data-path` and the file of `--data-args-path` are for all splits, to be divided by --split; the JSON file of
    `--per-split-data-args-path` is what `split_words` reads. A single word that is the name of a file of words stands
    for them. Raises UsageError for splits that are named twice and for words that are no blend.
    """
    given, others = _apart(request.options)
    if not given:
        return request, []
    try:
        splits = _splits(given, is_raw=request.values["MP_DATASET_TYPE"] == "raw")
    except ValueError as error:
        raise UsageError(str(error)) from None
    options = [text for name in (TRAIN, VALID) if name in splits for text in (name, *splits[name])]
    return request.changed(request.values, [*others, *options]), _notes(splits)


def _apart(options: Sequence[str]) -> tuple[dict[str, Words], list[str]]:
    """The options that name datasets with what follows them, and all others."""
    given: dict[str, Words] = {}
    others: list[str] = []
    for name, values in _grouped(options):
        if name not in (*OF_SPLITS, *DATA_OPTIONS):
            others += [name, *values]
        elif name in given:
            raise UsageError(f"{name} is given twice; give it once, with all of its words")
        elif not values:
            raise UsageError(f"{name} is followed by nothing; give a prefix, or `weight prefix weight prefix …`")
        else:
            given[name] = tuple(values)
    return given, others


def _grouped(options: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with the words up to the next; `--name=value` is written apart where it names datasets."""
    group: list[str] = []
    for text in options:
        name, has_value, value = text.partition("=")
        if text.startswith("--"):
            if group:
                yield group[0], group[1:]
            group = [name, value] if has_value and name in (*OF_SPLITS, *DATA_OPTIONS) else [text]
        else:
            group.append(text)
    if group:
        yield group[0], group[1:]


def _splits(given: Mapping[str, Words], *, is_raw: bool) -> dict[str, Words]:
    """The words of every split that is named."""
    several = [name for name in (TOGETHER, FILE, FILE_OF_SPLITS) if name in given]
    if len(several) > 1 or (several and any(name in given for name in OF_SPLITS)):
        raise UsageError(f"{' and '.join(given)} name the same datasets; give one of them, or one for each split")
    if not several:
        return {name: words if is_raw else _expanded(words, name) for name, words in given.items()}
    if several[0] == TOGETHER:
        words = given[TOGETHER] if is_raw else _expanded(given[TOGETHER], TRAIN)
        return {TRAIN: words, VALID: words}
    file = _file(given[several[0]], several[0])
    if several[0] == FILE:
        words = split_words(file)
        return {TRAIN: words, VALID: words}
    return {name: split_words(file, _split_of(name)) for name in (TRAIN, VALID)} | _test_of(file)


def _expanded(words: Words, name: str) -> Words:
    return split_words(words[0], _split_of(name)) if len(words) == 1 else words


def _split_of(name: str) -> str:
    return name.removeprefix("--").removesuffix("-data-path")


def _file(words: Words, name: str) -> str:
    if len(words) != 1 or not Path(words[0]).is_file():
        raise UsageError(f"{name} {' '.join(words)!r} is not the name of one file that exists")
    return words[0]


def _test_of(file: str) -> dict[str, Words]:
    try:
        return {TEST: split_words(file, _split_of(TEST))}
    except ValueError:  # a file need not name any
        return {}


def _notes(splits: Mapping[str, Words]) -> list[str]:
    if TEST not in splits:
        return []
    parse_blend(splits[TEST])
    return [f"{TEST} {' '.join(splits[TEST])} has no effect: a run validates, and tests nothing at its end"]
