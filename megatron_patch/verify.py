"""Proof that a converted checkpoint is its source: every bit of every tensor, and what a model makes of both."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from megatron_patch.checkpoint.interface import Source
from megatron_patch.checkpoint.stream import read_chunks, run_in_threads
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry, listed
from megatron_patch.model.decoder import GPTModel
from megatron_patch.model.rope import rotary_tables
from megatron_patch.parallel.mesh import single_process

TOLERANCE = 1e-5  # of the largest value, float32


def check_equal(entries: list[Entry], source: Source, written: Source) -> None:
    """Raise ValueError unless `written` holds every tensor of `source`, bit for bit, a NaN included.

    A conversion that rounds is checked against the source seen through `cast.Cast`.
    """
    different: list[str] = []
    jobs = [functools.partial(_compare, entry, source, written, different) for entry in entries]
    total = sum(_bytes(entry, source) for entry in entries)
    run_in_threads(jobs, total, "verifying")
    if different:
        raise ValueError(
            f"verification failed: {len(different)} tensors differ from the source ({listed(sorted(different))})"
        )


def check_can_run(config: ModelConfig, tokens: int) -> None:
    """Raise ValueError, before anything is converted, where `check_logits` could not run the model."""
    if tokens > config.max_position_embeddings:
        raise ValueError(
            f"logits of {tokens} tokens cannot be compared: max_position_embeddings is {config.max_position_embeddings}"
        )


@torch.no_grad()
def check_logits(entries: list[Entry], config: ModelConfig, source: Source, written: Source, tokens: int) -> None:
    """Raise ValueError unless both checkpoints give the same hidden state after each layer and the same logits.

    One random sequence of `tokens` tokens, float32. One layer of one checkpoint is in memory at a time.
    """
    ids_SB = torch.randint(config.vocab_size, (tokens, 1), generator=torch.Generator().manual_seed(0))
    ours = theirs = ids_SB
    for stage in _stages(config, tokens):
        ours = stage.run(_weights(entries, config, stage, written), ours)
        theirs = stage.run(_weights(entries, config, stage, source), theirs)
        largest, difference = theirs.abs().max(), (ours - theirs).abs().max()
        if not difference <= TOLERANCE * largest:  # a NaN fails too
            raise ValueError(
                f"verification failed: {stage.name} gives values of up to {largest:.3g} that differ by {difference:.3g}"
            )


@dataclass(frozen=True)
class _Stage:
    """A step of the model: `run(weights, x)`, its weights named as in the manifest but without `prefix`."""

    name: str
    prefix: str
    run: Callable[[dict[str, Tensor], Tensor], Tensor]


def _stages(config: ModelConfig, tokens: int) -> Iterator[_Stage]:
    with torch.device("meta"):
        model = GPTModel(config, range(config.num_layers), single_process())
    rotary = rotary_tables(config, torch.arange(tokens))
    yield _Stage("the embedding", "embedding.word_embeddings.", _call(model.embedding.word_embeddings))
    for number, layer in model.decoder.layers.items():
        yield _Stage(f"layer {number}", f"decoder.layers.{number}.", _call(layer, rotary))
    yield _Stage("the final norm", "decoder.final_layernorm.", _call(model.decoder.final_layernorm))
    if config.share_embeddings_and_output_weights:
        yield _Stage("the logits", "embedding.word_embeddings.", lambda weights, x: F.linear(x, weights["weight"]))
    else:
        yield _Stage("the logits", "output_layer.", _call(model.output_layer))


def _call(module: nn.Module, *arguments: Any) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda weights, x: functional_call(module, weights, (x, *arguments))


def _weights(entries: list[Entry], config: ModelConfig, stage: _Stage, source: Source) -> dict[str, Tensor]:
    """The stage's parameters in float32; those of a layer's experts are stacked [E, …] as the model has them."""
    weights: dict[str, Tensor] = {}
    for entry in entries:
        if not entry.mcore.startswith(stage.prefix):
            continue
        name = entry.mcore.removeprefix(stage.prefix)
        if entry.expert is None:
            weights[name] = source.read(entry).float()
            continue
        name = name.replace(f"local_experts.{entry.expert}.", "")
        if name not in weights:
            weights[name] = torch.empty(config.num_moe_experts, *entry.shape)
        weights[name][entry.expert] = source.read(entry)
    return weights


def _compare(entry: Entry, source: Source, written: Source, different: list[str]) -> int:
    """Note the entry if it differs; returns the bytes read of each."""
    is_equal = source.dtype_of(entry) == written.dtype_of(entry)
    done = 0
    if is_equal:
        for wanted, found in zip(read_chunks(source, entry), read_chunks(written, entry), strict=True):
            is_equal = is_equal and torch.equal(wanted.view(torch.uint8), found.view(torch.uint8))
            done += found.nbytes
    if not is_equal:
        different.append(entry.mcore)
    return done


def _bytes(entry: Entry, source: Source) -> int:
    return math.prod(entry.shape) * source.dtype_of(entry).itemsize
