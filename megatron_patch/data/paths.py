"""How dataset paths are written: one prefix, several, or weights and prefixes alternating. Standard library only."""

import json
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_patch.data.index_header import instruction_prefixes


class Source(NamedTuple):
    """One `.bin/.idx` prefix of a blend; no weight: as much as it holds."""

    prefix: str
    weight: float | None = None


def split_words(argument: str, split: str = "train") -> tuple[str, ...]:
    """A DATASET_PATH as words: an existing prefix is one word, spaces included; else shell words.

    The name of a file stands for the words in it: text, with comments from # on, or JSON such as
    `{"train": ["0.3", "a", "0.7", "b"], "valid": ["c"]}`, of which `split` is taken. Raises ValueError for unbalanced
    quotes, for nothing at all, for a file that says something else, and for a prefix with its .bin or .idx.
    """
    path = Path(argument)
    if Path(f"{argument}.idx").is_file() or Path(f"{instruction_prefixes(argument)[0]}.idx").is_file():
        return (argument,)
    if path.suffix in (".bin", ".idx") and path.with_suffix(".idx").is_file():
        raise ValueError(f"dataset path {argument!r}: write the prefix alone, {os.fspath(path.with_suffix(''))!r}")
    if path.is_file():
        return _words_of(path, split)
    return _shell_words(argument, argument)


def _words_of(path: Path, split: str) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"dataset path {os.fspath(path)!r} is neither a prefix nor a file of prefixes") from None
    if not text.lstrip().startswith("{"):
        return _shell_words(text, os.fspath(path), comments=True)
    try:
        words = json.loads(text).get(split)
    except ValueError as error:
        raise ValueError(f"dataset path {os.fspath(path)!r} is not JSON: {error}") from None
    if not words or not isinstance(words, list):
        raise ValueError(
            f"dataset path {os.fspath(path)!r}: {split!r} must be a list of prefixes, or weights and prefixes"
        )
    return tuple(map(str, words))


def _shell_words(text: str, name: str, *, comments: bool = False) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text, comments=comments))
    except ValueError as error:
        raise ValueError(f"dataset path {name!r}: {error}") from None
    if not words:
        raise ValueError(f"the dataset path {name!r} is empty; give a prefix, or `weight prefix weight prefix …`")
    return words


def parse_blend(words: Sequence[str]) -> list[Source]:
    """Words as sources: an even count whose every other word is a number is weights and prefixes, else all prefixes.

    Raises ValueError when only some of those words are numbers, or a weight is not positive, or what should be a prefix
    is a number and there is no dataset of that name.
    """
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 or all(weight is None for weight in weights):
        _check_prefixes(words)
        return [Source(word) for word in words]
    if None in weights:
        stray = words[2 * weights.index(None)]
        raise ValueError(
            f"dataset paths {' '.join(words)!r}: {stray!r} stands where a weight is expected; "
            "write `weight prefix` for every dataset or for none"
        )
    for word, weight in zip(words[::2], weights, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"dataset weight {word} of {' '.join(words)!r}: weights are positive numbers")
    if not math.isfinite(sum(weights)):
        raise ValueError(f"dataset weights of {' '.join(words)!r} are too large to be added up; write smaller ones")
    return [Source(prefix, weight) for prefix, weight in zip(words[1::2], weights, strict=True)]


def _check_prefixes(words: Sequence[str]) -> None:
    for word in words:
        if _number(word) is not None and not Path(f"{word}.idx").is_file():
            raise ValueError(
                f"dataset paths {' '.join(words)!r}: {word!r} stands where a prefix is expected; "
                "write `weight prefix` for every dataset or for none"
            )


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
