"""Rows of an input that cannot be used: refused, or left out, counted by reason and the first of them listed."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

SHOWN = 100  # sentences that are kept to be printed; all are counted


class LeftOut(NamedTuple):
    """What was left out, by reason, and sentences about the first; nothing may be unless `is_allowed`."""

    is_allowed: bool
    counts: Counter[str]
    shown: list[str]

    def add(self, reason: str, sentence: str) -> None:
        """Leave out one row. Raises ValueError with `sentence` if that is not allowed."""
        if not self.is_allowed:
            raise ValueError(sentence)
        self.counts[reason] += 1
        if len(self.shown) < SHOWN:
            self.shown.append(sentence)


def nothing_left_out(*, is_allowed: bool = False) -> LeftOut:
    """The beginning of every reading."""
    return LeftOut(is_allowed, Counter(), [])


def counted(counts: Mapping[str, int]) -> str:
    """`2 blank, 1 malformed`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
