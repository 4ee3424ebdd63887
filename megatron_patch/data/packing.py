"""Which records share a sample: first-fit over a window of samples that are still open."""

from collections.abc import Sequence

import numpy.typing as npt

from megatron_patch.data.gpt import Sample
from megatron_patch.data.instructions import InstructionDataset

WINDOW = 64


class PackedDataset:
    """Samples of several records each, segments that do not see each other.

    Which records meet depends on `order` alone (numbers of records, the ones that this dataset may use), so every rank
    and a continued run have the same samples.
    """

    def __init__(self, records: InstructionDataset, order: npt.NDArray) -> None:
        self._records = records
        rows = pack([records.tokens(int(number)) for number in order], records.length)
        self._rows = [[int(order[place]) for place in row] for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self._records.joined(self._rows[index])


def pack(sizes: Sequence[int], capacity: int, window: int = WINDOW) -> list[list[int]]:
    """The places in `sizes` of what each row holds; no row exceeds `capacity`, which is at least the largest size.

    Each goes into the first open row with room for it, else into a new one. When `window` rows are open, the fullest
    is closed first, so that what has been read of the data is enough to know its first rows.
    """
    rows: list[list[int]] = []
    open_rows: list[int] = []
    room: list[int] = []
    for place, size in enumerate(sizes):
        fit = next((k for k, left in enumerate(room) if left >= size), None)
        if fit is None:
            if len(room) == window:
                fullest = room.index(min(room))
                del room[fullest], open_rows[fullest]
            fit = len(room)
            open_rows.append(len(rows))
            room.append(capacity)
            rows.append([])
        rows[open_rows[fit]].append(place)
        room[fit] -= size
    return rows
