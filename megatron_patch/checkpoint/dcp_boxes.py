"""Which boxes of a whole parameter a rank's piece of it holds: arithmetic on shapes, without a tensor.

A piece is cut twice: tensor parallelism takes a shard of the parameter (`layouts.cut`), FSDP takes rows of the shard.
A piece of `[gate_r; up_r]` is up to two boxes of `[gate; up]`; rows that pad the vocabulary are in none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_patch.families.manifest import Entry

Extent = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """Elements of a whole parameter, by their first one and the extent along every axis, and where a piece has them."""

    start: Extent
    shape: Extent
    local: tuple[slice, ...]


def piece_boxes(entry: Entry, rank: int, size: int, start: Extent, shape: Extent) -> list[Box]:
    """The boxes of `entry` in the region at `start`, of `shape`, of the shard of tensor-parallel `rank` of `size`.

    None of them is empty, no element is in two, and those of all ranks and regions make up `entry.shape`.
    """
    boxes = (_overlap(*whole, start, shape) for whole in _shard_boxes(entry, rank, size))
    return [box for box in boxes if box is not None]


def overlap(start: Extent, shape: Extent, other_start: Extent, other_shape: Extent) -> Box | None:
    """What two regions of one tensor share, with its place in the second; None where they share nothing."""
    return _overlap(start, start, shape, other_start, other_shape)


def shard_region(shape: Sequence[int], cuts: Sequence[tuple[int, int, int]]) -> tuple[Extent, Extent]:
    """First element and extent of what is left of `shape` after `cuts`, each along an axis for a rank of so many.

    Every rank but the last gets the quotient rounded up, as `torch.chunk` cuts; the last ones may get nothing.
    """
    start, left = [0] * len(shape), list(shape)
    for axis, rank, size in cuts:
        share = -(-left[axis] // size)
        first = min(rank * share, left[axis])
        start[axis] += first
        left[axis] = min(share, left[axis] - first)
    return tuple(start), tuple(left)


def _shard_boxes(entry: Entry, rank: int, size: int) -> Iterator[tuple[Extent, Extent, Extent]]:
    """The boxes of a whole shard: start in the shard, start in the parameter, shape."""
    zero = (0,) * len(entry.shape)
    axis, blocks = _cut_axis(entry)
    if entry.shard is None or size == 1:
        yield zero, zero, entry.shape
        return
    length = -(-entry.shape[axis] // (blocks * size))
    for block in range(blocks):
        first = block * (entry.shape[axis] // blocks) + rank * length
        held = max(0, min(length, entry.shape[axis] - first))  # the last vocabulary shard is padded
        yield _at(zero, axis, block * length), _at(zero, axis, first), _at(entry.shape, axis, held)


def _cut_axis(entry: Entry) -> tuple[int, int]:
    """The axis that tensor parallelism cuts, and how many blocks along it it cuts separately."""
    return (1, 1) if entry.shard == "row" else (0, 2 if entry.layout == "gate_up" and entry.shard == "column" else 1)


def _at(extent: Extent, axis: int, value: int) -> Extent:
    return (*extent[:axis], value, *extent[axis + 1 :])


def _overlap(local: Extent, start: Extent, shape: Extent, piece: Extent, piece_shape: Extent) -> Box | None:
    """The part of the box at `local`, in the coordinates of `piece`, that lies in it; `start` is the box's own name."""
    first = tuple(map(max, local, piece))
    last = tuple(min(a + n, b + m) for a, n, b, m in zip(local, shape, piece, piece_shape, strict=True))
    if any(a >= b for a, b in zip(first, last, strict=True)):
        return None
    return Box(
        tuple(s + a - o for s, a, o in zip(start, first, local, strict=True)),
        tuple(b - a for a, b in zip(first, last, strict=True)),
        tuple(slice(a - o, b - o) for a, b, o in zip(first, last, piece, strict=True)),
    )
