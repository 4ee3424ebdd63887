"""Which elements of a dataset a run uses, and in which order."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from megatron_patch.config.data import DataConfig
from megatron_patch.data.splits import Divide, split_range

Order = Callable[[int], int]  # global sample position → index of the dataset


def usable(config: DataConfig, path: str, split: str, count: int, divide: Divide = split_range) -> tuple[int, int]:
    """The elements of `path` that this split may use: all of them unless training and validation share their data.

    Raises ValueError where that is none.
    """
    if config.train_data_path != config.valid_data_path:
        return 0, count
    first, last = divide(config.split, split, count)
    if first == last:
        raise ValueError(
            f"split {config.split!r} leaves nothing of {path!r} ({count} documents or records) for {split}; "
            "change --split or name another validation dataset"
        )
    return first, last


def in_turn(position: int) -> int:
    """The order of a dataset that is in order."""
    return position


def shuffled(first: int, last: int, seed: int) -> Order:
    """Every element once per pass, in an order of its own each pass: the same for every number of ranks.

    Megatron's `cyclic` order depends on the data-parallel size, so that it cannot go on with another; this one is not
    its equal. Takes 8 bytes an element for each of two passes.
    """
    count = last - first

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return first + np.random.default_rng((seed, epoch)).permutation(count)

    return lambda position: int(order(position // count)[position % count])


def repeated(first: int, last: int) -> Order:
    """Every element in its own order, again and again."""
    return lambda position: first + position % (last - first)
