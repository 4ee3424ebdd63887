"""Split strings (`99,1,0`): which share of a dataset is for training, validation and test. Standard library only."""

import re
from collections.abc import Callable
from itertools import accumulate

SPLITS = ("train", "valid", "test")
Divide = Callable[[str, str, int], tuple[int, int]]
_SEPARATOR = re.compile(r"\s*[,/;:]\s*|\s+")


def parse_split(text: str) -> tuple[float, ...]:
    """One to three shares, normalised to sum to 1: `90/10` → (0.9, 0.1, 0.0).

    Raises ValueError for anything that is not a non-negative number, for more than three, and for all zeros.
    """
    try:
        shares = [float(word) for word in _SEPARATOR.split(text.strip())]
    except ValueError:
        raise ValueError(f"split {text!r} is not a list of numbers; write train,valid,test such as 99,1,0") from None
    if len(shares) > len(SPLITS) or not all(0 <= share < float("inf") for share in shares) or not sum(shares):
        raise ValueError(f"split {text!r}: one to three non-negative numbers, not all zero, such as 99,1,0")
    total = sum(shares)
    return tuple(share / total for share in shares) + (0.0,) * (len(SPLITS) - len(shares))


def split_range(text: str, name: str, count: int) -> tuple[int, int]:
    """First and past-the-last of `count` elements that belong to `name`; both bounds rounded half to even."""
    bounds = [0.0, *accumulate(parse_split(text))]
    which = SPLITS.index(name)
    return round(bounds[which] * count), round(bounds[which + 1] * count)


def shifted_split_range(text: str, name: str, count: int) -> tuple[int, int]:
    """The same as ModelLink divides instruction data: each share is rounded, then every bound is shifted so that the
    last is `count`."""
    bounds = [0, *accumulate(round(share * count) for share in parse_split(text))]
    bounds = [0, *(max(bound - (bounds[-1] - count), 0) for bound in bounds[1:])]
    which = SPLITS.index(name)
    return bounds[which], bounds[which + 1]
