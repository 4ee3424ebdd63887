"""What training writes: boxes of whole parameters as torch.distributed.checkpoint lays them out, under manifest names.

Beside the weights stand AdamW's moments and each rank's random state, under names of their own. `run.json`, which the
run adds, records a checksum of every file.
"""

import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_patch.checkpoint.atomic import write_text
from megatron_patch.checkpoint.disk import named_errors
from megatron_patch.checkpoint.distcp import DATA, INDEX, BlankBox, lay_out
from megatron_patch.checkpoint.interface import Source, Target, Written
from megatron_patch.checkpoint.mcore import iteration_name
from megatron_patch.checkpoint.paced import PacedFiles
from megatron_patch.checkpoint.stream import Piece, Place, fill
from megatron_patch.config.checkpoint import TRACKER
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry
from megatron_patch.parallel.progress import Progress

OPTIMIZER, RANDOM = "optimizer.", "random."
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorBox:
    """A box to write: its tensor's name and shape, its first element in it, and its values on the CPU."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    values: Tensor


class _BoxPlanner(SavePlanner):
    """Plans exactly the boxes it is given; those of all ranks must tile their tensors."""

    def __init__(self, boxes: Iterable[TensorBox], progress: Progress) -> None:
        self._boxes, self._progress = {(box.name, box.start): box for box in boxes}, progress

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing is to be found in a state dict."""

    def create_local_plan(self) -> SavePlan:
        """A write per box."""
        return SavePlan([_write_item(box) for box in self._boxes.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plans as they are, and the index of what they write."""
        with self._progress.busy("planning what every rank writes"):
            plans, index = create_default_global_save_plan(all_plans)
        for name, found in index.state_dict_metadata.items():
            elements = sum(chunk.sizes.numel() for chunk in found.chunks)
            assert elements == found.size.numel(), f"{name}: {elements} of {found.size.numel()} elements are written"
        return plans, index

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As the coordinator left it."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of a planned box."""
        self._progress.moved(f"writing {write_item.index.fqn}")
        return self._boxes[write_item.index.fqn, tuple(write_item.index.offset)].values


class _Writer(dcp.FileSystemWriter):
    """Writes one file per rank, in steps, and tells when it does."""

    def __init__(self, directory: Path, progress: Progress) -> None:
        super().__init__(directory, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        self.fs, self._progress = PacedFiles(lambda: progress.moved(progress.doing)), progress
        self._directory = directory

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """The boxes of a rank; they are on the disk when this returns."""
        with self._progress.busy("opening its file"), named_errors(self._directory):
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The index, on one rank."""
        with self._progress.busy(f"writing {INDEX}"):
            super().finish(metadata, results)


def write_boxes(directory: Path, boxes: Iterable[TensorBox], progress: Progress) -> None:
    """Write the boxes of every rank of a task into `directory`, on the disk on return.

    Raises OSError on every rank, in one sentence, when one of them could not write.
    """
    # one process without a group is what is wanted there
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
    writer, planner, group = _Writer(directory, progress), _BoxPlanner(boxes, progress), progress.group
    try:
        dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise _sentence(error) from None


def files_of_rank(directory: Path, rank: int) -> list[Path]:
    """The files that `write_boxes` wrote on `rank`."""
    return sorted(directory.glob(f"__{rank}_*.distcp")) + ([directory / INDEX] if rank == 0 else [])


def checksum(path: Path, moved: Callable[[str], None] = lambda doing: None) -> dict[str, int | str]:
    """Length and CRC-32 of a file, as `run.json` records them; `moved` hears of every few megabytes read."""
    crc = length = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc, length = zlib.crc32(chunk, crc), length + len(chunk)
            moved(f"reading {path.name}")
    return {"bytes": length, "crc32": f"{crc:08x}"}


def damage(
    directory: Path,
    files: Mapping[str, Mapping[str, int | str]],
    names: Sequence[str],
    moved: Callable[[str], None] = lambda doing: None,
) -> str | None:
    """One phrase about the first of `names` that is not the file it was when `files` was recorded; None: all are."""
    for name in names:
        path, recorded = directory / name, files[name]
        if not path.is_file():
            return f"{path} does not exist"
        if path.stat().st_size != recorded["bytes"]:
            return f"{path} has {path.stat().st_size:,} bytes, and {recorded['bytes']:,} were written"
        if checksum(path, moved) != dict(recorded):
            return f"{path} is damaged: its checksum is not the one recorded when it was written"
    return None


def write_dcp(directory: Path, entries: list[Entry], config: ModelConfig, source: Source, target: Target) -> Written:
    """Write the weights alone to `directory`/release, every parameter in one box, and the tracker."""
    release = directory / iteration_name(None)
    release.mkdir()
    shapes = {entry.mcore: entry.shape for entry in entries}
    boxes = (BlankBox(e.mcore, (0,) * len(e.shape), e.shape, source.dtype_of(e)) for e in entries)
    offsets = lay_out(release, shapes, boxes, ())
    pieces = [Piece(entry, entry.shape, _as_it_is) for entry in entries]
    written = fill([Place(release / DATA, *place) for place in zip(offsets, pieces, strict=True)], source)
    write_text(directory / TRACKER, "release")
    return written


def _as_it_is(entry: Entry, whole: Tensor) -> Tensor:
    return whole


def _write_item(box: TensorBox) -> WriteItem:
    start = torch.Size(box.start)
    data = TensorWriteData(
        ChunkStorageMetadata(start, box.values.shape), TensorProperties(box.values.dtype), torch.Size(box.shape)
    )
    return WriteItem(MetadataIndex(box.name, start), WriteItemType.SHARD, tensor_data=data)


def _sentence(error: CheckpointException) -> Exception:
    """What went wrong on the first rank where something did; torch's zip writer only says that it lost its place."""
    rank, (cause, _) = min(error.failures.items())
    found: BaseException | None = cause
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    if found is None:
        return cause
    return OSError(found.errno, f"rank {rank}: {os.strerror(found.errno or 0)}", found.filename)
