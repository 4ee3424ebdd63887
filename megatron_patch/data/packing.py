"""Which records share a sample: first-fit over a window of samples that are still open."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy.typing as npt

from megatron_patch.data.gpt import Sample
from megatron_patch.data.instructions import InstructionDataset

WINDOW = 64
Item = TypeVar("Item")


class PackedDataset:
    """Samples of several records each, segments that do not see each other.

    Which records meet depends on `order` alone (numbers of records, the ones that this dataset may use), so every rank
    and a continued run have the same samples.
    """

    def __init__(self, records: InstructionDataset, order: npt.NDArray) -> None:
        self._records = records
        rows = pack((records.tokens(int(number)) for number in order), records.length)
        self._rows = [[int(order[place]) for place in row] for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self._records.joined(self._rows[index])


def pack(sizes: Iterable[int], capacity: int, window: int = WINDOW) -> Iterator[list[int]]:
    """The places in `sizes` of what each row holds; no row exceeds `capacity`, which is at least the largest size.

    Each goes into the first open row with room for it, else into a new one. A full row is given out at once, the
    fullest when `window` rows are open and another is needed, the rest at the end.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for place, size in enumerate(sizes):
        fit = next((number for number, left in enumerate(room) if left >= size), None)
        if fit is None:
            if len(room) == window:
                yield _close(rows, room, room.index(min(room)))
            fit = len(room)
            rows.append([])
            room.append(capacity)
        rows[fit].append(place)
        room[fit] -= size
        if not room[fit]:
            yield _close(rows, room, fit)
    yield from rows


def packed(items: Iterable[Item], size: Callable[[Item], int], capacity: int) -> Iterator[list[Item]]:
    """The rows of `pack` themselves; what waits in memory is what the open rows hold."""
    waiting: dict[int, Item] = {}

    def sizes() -> Iterator[int]:
        for place, item in enumerate(items):
            waiting[place] = item
            yield size(item)

    for row in pack(sizes(), capacity):
        yield [waiting.pop(place) for place in row]


def _close(rows: list[list[int]], room: list[int], number: int) -> list[int]:
    del room[number]
    return rows.pop(number)
