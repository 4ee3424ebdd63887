"""Megatron's classic checkpoint on disk: a tracker file, and `release|iter_NNNNNNN/mp_rank_…/model_optim_rng.pt`.

A conversion writes every rank's file; in training each rank writes its own. `mcore_source` reads them.
"""

import argparse
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.checkpoint.atomic import move_directory, write_text
from megatron_patch.checkpoint.disk import named_errors
from megatron_patch.checkpoint.interface import Source, Target, Written
from megatron_patch.checkpoint.layouts import check_divides, cut, shard_shape
from megatron_patch.checkpoint.megatron_args import megatron_args
from megatron_patch.checkpoint.paced import PacedFile
from megatron_patch.checkpoint.placement import (
    Slot,
    as_cut,
    check_layout,
    file_slots,
    rank_name,
    ranks,
    stage_ranges,
)
from megatron_patch.checkpoint.stream import Piece, write_pt
from megatron_patch.config.checkpoint import RANK_FILE, TRACKER
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry

MOST_DIGITS = 18  # of an iteration


def holds_mcore(directory: Path) -> bool:
    """Whether `directory` looks like a classic Megatron checkpoint."""
    return (directory / TRACKER).is_file() or any(directory.glob(f"*/mp_rank_*/{RANK_FILE}"))


def latest_directory(root: Path) -> Path:
    """The directory that the tracker file of `root` names."""
    path = root / TRACKER
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it names the iteration to read, or says release")
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS):
        raise ValueError(f"{path} says {text[:40]!r}; it must be release or an iteration number")
    directory = root / iteration_name(None if text == "release" else int(text))
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist, but {path} names it")
    return directory


def rank_directories(iteration: Path) -> list[Path]:
    """What is called a rank's directory. Raises PermissionError, which a glob would take for no match."""
    return sorted(path for path in iteration.iterdir() if path.name.startswith("mp_rank_"))


def iteration_name(iteration: int | None) -> str:
    """The directory of an iteration; None is a release (a conversion, not a training step)."""
    return "release" if iteration is None else f"iter_{iteration:07d}"


def check_mcore(entries: list[Entry], config: ModelConfig, target: Target) -> None:
    """Raise ValueError for a layout into which the model cannot be divided."""
    check_layout(config, target)
    for entry in entries:
        check_divides(as_cut(entry, target), config, target.tp)


def write_mcore(directory: Path, entries: list[Entry], config: ModelConfig, source: Source, target: Target) -> Written:
    """Write `directory`/release, a file for every rank of `target`, and the tracker."""
    release = directory / iteration_name(None)
    layers = stage_ranges(config.num_layers, target)
    args = megatron_args(config, target, source.dtype)
    slots = {
        place: list(file_slots(entries, config, target, layers, *place))
        for place in itertools.product(range(target.pp), range(target.ep))
    }
    files = (
        (release / rank_name(target, *rank) / RANK_FILE, _payload(slots[rank[1:]], rank[0], target, args))
        for rank in ranks(target)
    )
    written = write_pt(files, source)
    write_text(directory / TRACKER, "release")
    return written


def _payload(slots: list[Slot], tp_rank: int, target: Target, args: argparse.Namespace) -> dict[str, Any]:
    """A rank file's content, its tensors still to be made."""
    chunks: list[dict[str, Piece]] = [{} for _ in range(target.vp)]
    for slot in slots:
        shape = shard_shape(as_cut(slot.entry, target), target.tp)
        chunks[slot.chunk][slot.key] = Piece(slot.entry, shape, functools.partial(_shard, target, tp_rank))
    return _around(args) | dict(zip(_chunk_names(target.vp), chunks, strict=True))


def _shard(target: Target, tp_rank: int, entry: Entry, whole: Tensor) -> Tensor:
    return cut(as_cut(entry, target), whole, tp_rank, target.tp)


def _around(args: argparse.Namespace, iteration: int | None = None) -> dict[str, Any]:
    return {"args": args, "checkpoint_version": 3.0, "iteration": iteration or 0}


def write_rank(
    root: Path,
    iteration: int | None,
    name: str,
    chunks: Sequence[Mapping[str, Tensor]],
    args: argparse.Namespace,
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Write one rank's file where no reader looks; `publish` makes it visible once every rank has written.

    `name` is the rank's directory, `chunks` the shards of each of its virtual chunks under the names they get on disk.
    Any number of processes may write their own rank; `moved` is called as the file grows.
    """
    directory = _unpublished(root, iteration) / name
    directory.mkdir(parents=True, exist_ok=True)
    alone = [{key: _alone(tensor) for key, tensor in chunk.items()} for chunk in chunks]
    payload = _around(args, iteration) | dict(zip(_chunk_names(len(chunks)), alone, strict=True))
    _save(directory / RANK_FILE, payload, moved)


def publish(root: Path, iteration: int | None, names: Sequence[str]) -> Path:
    """Make an iteration visible, in one process after all ranks, `names`, wrote: rename it, then the tracker, last.

    Returns the iteration's directory. Raises FileNotFoundError when a rank's file is missing; what an interrupted save
    on another layout left there is removed.
    """
    directory = _unpublished(root, iteration)
    for name in names:
        if not (directory / name / RANK_FILE).is_file():
            raise FileNotFoundError(f"{directory / name / RANK_FILE} was not written; iteration is not published")
    for found in directory.iterdir():
        if found.name not in names:
            shutil.rmtree(found)
    target = root / iteration_name(iteration)
    move_directory(directory, target)
    write_text(root / TRACKER, "release" if iteration is None else str(iteration))
    return target


def _unpublished(root: Path, iteration: int | None) -> Path:
    return root / f".{iteration_name(iteration)}.partial"


def _chunk_names(count: int) -> list[str]:
    return ["model"] if count == 1 else [f"model{chunk}" for chunk in range(count)]


def _save(path: Path, payload: dict[str, Any], moved: Callable[[], None]) -> None:
    """`torch.save`, on the disk when it returns. Raises OSError naming `path` when the disk is full."""
    with named_errors(path), PacedFile(path, moved) as file:
        torch.save(payload, file)
        os.fsync(file.fileno())


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU and in a storage of its own size: torch.save writes the whole storage behind a view."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
