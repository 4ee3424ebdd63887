"""Where every row of a rearranged tensor comes from, so that rows move from file to file without a copy of the whole.

Merging, cutting, joining and splitting only move whole rows and blocks of columns. Run on small tensors of row
*numbers* they say, through the same code that would move the data, which stored rows make up each row of the result.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_patch.families.manifest import Entry

MOST_NUMBERS = 1 << 20  # that are used whatever they stand for: two copies of them, int32, take 8 MiB
NUMBER_BYTES = 16  # that one of more has to stand for, so that they take half of what the tensor itself would
BLOCK_ROWS = 1 << 16  # that are compared with their neighbours at once

Rearrange = Callable[[Entry, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Move:
    """Columns of a band and the stored rows they come from: `part` None is padding, zeros."""

    columns: slice
    part: int | None
    row: int
    part_columns: slice


@dataclass(frozen=True)
class Band:
    """Consecutive rows of the result whose sources are consecutive too."""

    start: int
    stop: int
    moves: tuple[Move, ...]

    def copy(self, parts: list[Tensor], start: int, stop: int, out: Tensor) -> None:
        """Fill `out` with rows `start` to `stop` of the result, rounded to its type."""
        for move in self.moves:
            columns = out[:, move.columns]
            if move.part is None:
                columns.zero_()
            else:
                first = move.row + start - self.start
                columns.copy_(_matrix(parts[move.part])[first : first + stop - start, move.part_columns])

    def stored(self, parts: list[Tensor]) -> Tensor | None:
        """The band's rows where they stand in one piece; None where they are gathered."""
        move = self.moves[0]
        if len(self.moves) > 1 or move.part is None:
            return None
        matrix = _matrix(parts[move.part])
        rows = matrix[move.row : move.row + self.stop - self.start, move.part_columns]
        return rows if rows.is_contiguous() else None


def trace(entry: Entry, parts: list[Tensor], shape: tuple[int, ...], rearrange: Rearrange) -> list[Band] | None:
    """The bands of `rearrange(entry, parts)`, whose shape is `shape`.

    None where it does not move whole blocks, or so small ones that telling them apart takes more memory than them.
    """
    if len(entry.shape) > 2 or len(shape) > 2 or any(part.dim() != len(entry.shape) for part in parts):
        return None
    widths = [_matrix_shape(size)[1] for size in (entry.shape, shape, *(tuple(part.shape) for part in parts))]
    width = math.gcd(*widths)
    stride = max(widths) // width
    if sum(map(torch.numel, parts)) > MOST_NUMBERS * width and width * parts[0].element_size() < NUMBER_BYTES:
        return None
    numbers, bases = _number_rows(parts, width, stride)
    small = replace(entry, shape=(entry.shape[0], *(size // width for size in entry.shape[1:])))
    result = rearrange(small, numbers)
    if tuple(result.shape) != (shape[0], *(size // width for size in shape[1:])):
        return None
    return list(_bands(result.reshape(shape[0], -1), bases, width, stride))


def _number_rows(parts: list[Tensor], width: int, stride: int) -> tuple[list[Tensor], list[int]]:
    """Each part as unique numbers, one for `width` columns of a row: consecutive rows differ by `stride`; 0 is free."""
    bases = [1]
    for part in parts:
        bases.append(bases[-1] + stride * (len(part) + 1))  # the gap keeps a band from running on into the next part
    dtype = torch.int32 if bases[-1] < 1 << 31 else torch.int64
    numbers = []
    for part, base in zip(parts, bases[:-1], strict=True):
        number = torch.arange(base, base + stride * len(part), stride, dtype=dtype)
        blocks = torch.arange(_matrix_shape(tuple(part.shape))[1] // width, dtype=dtype)
        in_rows = number.unsqueeze(1) if len(blocks) == 1 else number.unsqueeze(1) + blocks
        numbers.append(number if part.dim() == 1 else in_rows)
    return numbers, bases[:-1]


def _bands(result: Tensor, bases: list[int], width: int, stride: int) -> Iterator[Band]:
    breaks = [0]
    for first in range(0, len(result) - 1, BLOCK_ROWS):
        above, below = result[first : first + BLOCK_ROWS + 1][:-1], result[first + 1 : first + BLOCK_ROWS + 1]
        goes_on = torch.where(above == 0, below == 0, below - above == stride)
        breaks += (~goes_on.all(1)).nonzero().flatten().add(first + 1).tolist()
    for start, stop in itertools.pairwise([*breaks, len(result)]):
        cells = [_decode(number, bases, stride) for number in result[start].tolist()]
        yield Band(start, stop, tuple(_moves(cells, width)))


def _decode(number: int, bases: list[int], stride: int) -> tuple[int | None, int, int]:
    """Part, row and column block of a number."""
    if number == 0:
        return None, 0, 0
    part = max(index for index, base in enumerate(bases) if base <= number)
    return part, *divmod(number - bases[part], stride)


def _moves(cells: list[tuple[int | None, int, int]], width: int) -> Iterator[Move]:
    """Neighbouring cells that are neighbours in the same stored row too become one move."""
    first = 0
    for last in range(1, len(cells) + 1):
        part, row, column = cells[first]
        expected = (part, row, column + last - first) if part is not None else (None, 0, 0)
        if last < len(cells) and cells[last] == expected:
            continue
        stored = slice(column * width, (column + last - first) * width)
        yield Move(slice(first * width, last * width), part, row, stored)
        first = last


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)
