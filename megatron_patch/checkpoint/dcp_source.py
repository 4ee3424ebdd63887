"""Reading what training wrote: any region of any tensor from the boxes it lies in, and whole parameters in a stream."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_patch.checkpoint.dcp import OPTIMIZER, RANDOM, damage
from megatron_patch.checkpoint.dcp_boxes import overlap
from megatron_patch.checkpoint.distcp import Part, Stored, map_part, read_index
from megatron_patch.checkpoint.mcore import latest_directory
from megatron_patch.checkpoint.stream import run_in_threads
from megatron_patch.config.checkpoint import RUN, TRACKER, why_unreadable
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry, check_complete

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class DcpSource:
    """An open iteration: the boxes of each manifest name, by rows and then by columns."""

    directory: Path
    stored: Mapping[str, tuple[Part, ...]]
    format: str = "dcp"

    @property
    def dtype(self) -> torch.dtype:
        """The type of most tensors."""
        return Counter(parts[0].dtype for parts in self.stored.values()).most_common(1)[0][0]

    @property
    def layout(self) -> Mapping[str, int]:
        """Tensors have no layout: boxes fit together whichever ranks wrote them."""
        return {}

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """The type of `entry`."""
        return self.stored[entry.mcore][0].dtype

    def parts(self, entry: Entry) -> list[Tensor]:
        """The mapped boxes. Raises ValueError for a damaged one."""
        return [map_part(part) for part in self.stored[entry.mcore]]

    def assemble(self, entry: Entry, parts: list[Tensor]) -> Tensor:
        """Boxes side by side until a band is as wide as the parameter, then band below band."""
        if len(parts) == 1:
            return parts[0]
        if parts[0].dim() == 1:
            return torch.cat(parts)
        bands: list[Tensor] = []
        row: list[Tensor] = []
        for part in parts:
            row.append(part)
            if sum(box.shape[1] for box in row) == entry.shape[1]:
                bands.append(row[0] if len(row) == 1 else torch.cat(row, dim=1))
                row = []
        return bands[0] if len(bands) == 1 else torch.cat(bands)

    def read(self, entry: Entry) -> Tensor:
        """The full mcore tensor, `entry.shape`."""
        return self.assemble(entry, self.parts(entry))

    def describe(self) -> str:
        """One phrase for the log."""
        return f"dcp {self.directory.name}, {str(self.dtype).removeprefix('torch.')}"


def open_dcp(root: Path, entries: list[Entry], config: ModelConfig) -> DcpSource:
    """Open the weights of the iteration that the tracker names, once every file has its recorded checksum.

    Raises ValueError or FileNotFoundError in one sentence, with the path, for a missing or damaged file, and for
    names, shapes or types other than `entries`.
    """
    directory = latest_directory(root)
    _check_files(directory)
    weights = read_weights_index(directory, entries)
    return DcpSource(directory, {entry.mcore: _in_order(directory, entry, weights[entry.mcore]) for entry in entries})


def read_weights_index(directory: Path, entries: Sequence[Entry]) -> dict[str, Stored]:
    """Every tensor of an iteration by name. Raises as `open_dcp` unless its weights are exactly `entries`."""
    index = read_index(directory)
    weights = {name for name in index if not name.startswith((OPTIMIZER, RANDOM))}
    check_complete([entry.mcore for entry in entries], weights, str(directory))
    for entry in entries:
        found = index[entry.mcore]
        if found.shape != entry.shape:
            raise ValueError(f"{directory}: {entry.mcore} has shape {found.shape}, config.json implies {entry.shape}")
        if found.dtype not in _DTYPES:
            raise ValueError(f"{directory}: {entry.mcore} is {found.dtype}; supported are fp32, fp16 and bf16")
    return index


def read_region(name: str, stored: Stored, start: tuple[int, ...], out: Tensor) -> None:
    """Fill `out` with the region of tensor `name` at `start`, from however many boxes. ValueError where one lacks."""
    count = 0
    for box in stored.boxes:
        shared = overlap(box.start, box.shape, start, tuple(out.shape))
        if shared is not None:
            first = [a - o for a, o in zip(shared.start, box.start, strict=True)]
            inside = tuple(slice(a, a + n) for a, n in zip(first, shared.shape, strict=True))
            out[shared.local].copy_(map_part(Part(box, stored.dtype, inside)))
            count += math.prod(shared.shape)
    if count != out.numel():
        raise ValueError(f"{name}: {count} of the {out.numel()} elements from {start} on are stored")


def recorded_files(directory: Path) -> dict[str, dict[str, int | str]]:
    """Length and checksum of each file of an iteration; empty where no run wrote it. ValueError if that is damaged."""
    path = directory / RUN
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["files"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: {why_unreadable(error)}; take an earlier iteration, by its number in {TRACKER}"
        ) from None


def _check_files(directory: Path) -> None:
    """Raise ValueError for the first file that has changed since it was written, where that was recorded."""
    files = recorded_files(directory)
    found: list[str] = []

    def check(name: str) -> int:
        found.extend(filter(None, [damage(directory, files, [name])]))
        return 0

    run_in_threads([lambda name=name: check(name) for name in files], 0, "checking")
    if found:
        raise ValueError(f"{min(found)}; take an earlier iteration, by its number in the tracker file")


def _in_order(directory: Path, entry: Entry, stored: Stored) -> tuple[Part, ...]:
    """The boxes by rows, then columns. Raises ValueError unless they tile the parameter in bands of equal height."""
    boxes = sorted(stored.boxes, key=lambda box: box.start)
    filled, end, height = 0, 0, 0  # columns of the current band, its last row, its rows
    for box in boxes:
        row, column = box.start[0], (*box.start, 0)[1]
        if filled == 0:
            end, height = end + height, box.shape[0]
        if (row, column, box.shape[0]) != (end, filled, height):
            raise ValueError(f"{directory}: the boxes of {entry.mcore} do not fit together at {box.start}")
        filled = (filled + _width(box.shape)) % _width(entry.shape)
    if filled or end + height != entry.shape[0]:
        raise ValueError(f"{directory}: the boxes of {entry.mcore} do not make up its {entry.shape} elements")
    return tuple(Part(box, stored.dtype, tuple(slice(0, n) for n in box.shape)) for box in boxes)


def _width(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else 1
