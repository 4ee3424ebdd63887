"""Megatron-LM's legacy checkpoints, in four spellings: recognised, read and written at any TP × PP × EP.

A tracker file and `release|iter_NNNNNNN/mp_rank_…/model_optim_rng.pt`, whose `model` is a tree under
`language_model`. Vocabulary rows are padded to divide by TP with copies of the last one, and cut off when read.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.checkpoint.atomic import write_text
from megatron_patch.checkpoint.interface import Format, Source, Target, Written
from megatron_patch.checkpoint.layouts import check_divides, cut, shard_shape
from megatron_patch.checkpoint.legacy_source import open_legacy, spelling_of
from megatron_patch.checkpoint.mcore import iteration_name
from megatron_patch.checkpoint.megatron_args import megatron_args
from megatron_patch.checkpoint.placement import check_layout, rank_name, ranks, stage_ranges
from megatron_patch.checkpoint.spellings import ENCODER, SPELLINGS, Item, Spelling, items
from megatron_patch.checkpoint.stream import Piece, Stack, write_pt
from megatron_patch.config.checkpoint import RANK_FILE, TRACKER
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry


def check_legacy(spelling: Spelling, entries: list[Entry], config: ModelConfig, target: Target) -> None:
    """Raise ValueError for a model or a layout that the format cannot hold."""
    if spelling.needs_experts and not config.num_moe_experts:
        told = f"{spelling.format} holds mixtures of experts and this model is dense"
        raise ValueError(f"{told}; write it as modellink, or upcycle it")
    check_layout(config, target)
    for entry in entries:
        check_divides(entry, config, target.tp)
    items(spelling, entries, config, target, range(config.num_layers), 0)


def write_legacy(
    spelling: Spelling, directory: Path, entries: list[Entry], config: ModelConfig, source: Source, target: Target
) -> Written:
    """Write every rank's file under `directory`/release, and the tracker last."""
    if spelling.expert_first:
        target = replace(target, etp=1)
    payload = {"args": _args(spelling, config, target, source.dtype), "checkpoint_version": 3.0, "iteration": 0}
    stages = list(itertools.chain.from_iterable(stage_ranges(config.num_layers, target)))

    def files() -> Iterator[tuple[Path, Mapping[str, Any]]]:
        for tp_rank, stage, ep_rank in ranks(target):
            found = items(spelling, entries, config, target, stages[stage], ep_rank)
            name = _rank_name(spelling, target, tp_rank, stage, ep_rank)
            yield (
                directory / iteration_name(None) / name / RANK_FILE,
                payload | {"model": _nest(_tensors(found, tp_rank, target))},
            )

    written = write_pt(files(), source)
    write_text(directory / TRACKER, "release")
    return written


def _tensors(found: Sequence[Item], tp_rank: int, target: Target) -> Iterator[tuple[str, Piece | Stack]]:
    for item in found:
        for key, part in zip(item.keys, item.packing.parts, strict=True):
            pieces = tuple(_piece(item, entry, part, tp_rank, target) for entry in item.entries)
            yield key, pieces[0] if len(pieces) == 1 else Stack(pieces, item.shape(pieces[0].shape))


def _piece(item: Item, entry: Entry, part: Callable[[Tensor], Tensor], tp_rank: int, target: Target) -> Piece:
    def make(traced: Entry, whole: Tensor) -> Tensor:
        return part(_cut(replace(traced, shard=entry.shard), whole, tp_rank, target.tp))

    shard = torch.empty(shard_shape(entry, target.tp), device="meta")
    return Piece(entry, tuple(part(shard).shape), make, item.packing.moves_rows)


def _cut(entry: Entry, whole: Tensor, rank: int, size: int) -> Tensor:
    """`layouts.cut`, with copies of the last row as vocabulary padding."""
    if entry.shard != "vocab":
        return cut(entry, whole, rank, size)
    rows = shard_shape(entry, size)[0]
    own = whole[rank * rows : (rank + 1) * rows]
    return own if len(own) == rows else torch.cat([own, whole[-1:].expand(rows - len(own), -1)])


def _nest(tensors: Iterator[tuple[str, Piece | Stack]]) -> dict[str, Any]:
    """The tree that Megatron-LM saves: the encoder's parameters flat under their own names, all else nested."""
    tree: dict[str, Any] = {}
    for key, tensor in tensors:
        name = key.removeprefix(ENCODER)
        *branch, leaf = key.split(".") if name == key else [*ENCODER.split(".")[:-1], name]
        functools.reduce(lambda node, step: node.setdefault(step, {}), branch, tree)[leaf] = tensor
    return tree


def _args(spelling: Spelling, config: ModelConfig, target: Target, dtype: torch.dtype) -> argparse.Namespace:
    args = vars(megatron_args(config, target, dtype)) | {"transformer_impl": "local"}
    if config.num_moe_experts:
        args |= {"ffn_hidden_size": config.moe_ffn_hidden_size}  # the only width that Megatron-LM's own experts have
    if spelling.expert_first:
        args |= {
            "moe_num_experts": config.num_moe_experts,
            "moe_top_k": config.moe_router_topk,
            "moe_expert_model_parallelism": True,
            "moe_normalize_expert_weights": None if config.moe_router_pre_softmax else 1,
        }
    return argparse.Namespace(**args)


def _rank_name(spelling: Spelling, target: Target, tp_rank: int, stage: int, ep_rank: int) -> str:
    if not spelling.expert_first:
        return rank_name(target, tp_rank, stage, ep_rank)
    return f"mp_rank_{tp_rank:02d}_{ep_rank:03d}" + (f"_{stage:03d}" if target.pp > 1 else "")


def _format(spelling: Spelling) -> Format:
    return Format(
        spelling.format,
        TRACKER,
        lambda directory: spelling_of(directory) is spelling,
        functools.partial(open_legacy, spelling),
        functools.partial(check_legacy, spelling),
        functools.partial(write_legacy, spelling),
        frozenset({"tp", "pp", "ep"} if spelling.experts else {"tp", "pp"}),
    )


LEGACY_FORMATS = tuple(_format(spelling) for spelling in SPELLINGS)
