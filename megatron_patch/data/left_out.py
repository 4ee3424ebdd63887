"""Rows of an input that cannot be used: refused, or left out, counted by reason and the first of them listed."""

import sys
from collections import Counter
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
        self.include(LeftOut(True, Counter([reason]), [sentence]))

    def include(self, other: "LeftOut") -> None:
        """Leave out what `other` did."""
        self.counts.update(other.counts)
        self.shown.extend(other.shown[: SHOWN - len(self.shown)])

    def in_brackets(self) -> str:
        """` (2 blank, 1 malformed left out)`, or nothing."""
        return f" ({self._counted()} left out)" if self.counts else ""

    def tell(self) -> None:
        """Print the sentences to standard error, and how many rows were left out."""
        for sentence in self.shown:
            print(f"left out: {sentence}", file=sys.stderr)
        if self.counts:
            print(f"left out: {self._counted()}")

    def _counted(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.counts.items()))


def nothing_left_out(*, is_allowed: bool = False) -> LeftOut:
    """The beginning of every reading."""
    return LeftOut(is_allowed, Counter(), [])
