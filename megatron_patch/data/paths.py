"""How dataset paths are written: one prefix, several, or weights and prefixes alternating. Standard library only."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """One `.bin/.idx` prefix of a blend; no weight: as much as it holds."""

    prefix: str
    weight: float | None = None


def split_words(argument: str) -> tuple[str, ...]:
    """A DATASET_PATH as words: an existing prefix or file is one word, spaces included; else shell words.

    Raises ValueError for unbalanced quotes and for nothing at all.
    """
    if Path(f"{argument}.idx").is_file() or Path(argument).is_file():
        return (argument,)
    try:
        words = tuple(shlex.split(argument))
    except ValueError as error:
        raise ValueError(f"dataset path {argument!r}: {error}") from None
    if not words:
        raise ValueError("the dataset path is empty; give a prefix, or `weight prefix weight prefix …`")
    return words


def parse_blend(words: Sequence[str]) -> list[Source]:
    """Words as sources: an even count whose every other word is a number is weights and prefixes, else all prefixes.

    Raises ValueError when only some of those words are numbers, or a weight is not positive.
    """
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 or all(weight is None for weight in weights):
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
    return [Source(prefix, weight) for prefix, weight in zip(words[1::2], weights, strict=True)]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
