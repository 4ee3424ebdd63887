"""The weights a model starts from: read from a checkpoint, or drawn."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_patch.checkpoint.layouts import cut
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.weights.parameters import local_expert, named_parameters, parameter_name, shard_axis


class StartWeights(Protocol):
    """Anything that knows a parameter in full: a checkpoint, or a random draw."""

    def read(self, entry: Entry) -> Tensor:
        """The whole tensor, of shape `entry.shape`."""

    def describe(self) -> str:
        """One phrase for the log."""


@dataclass(frozen=True)
class RandomWeights:
    """Megatron's initialisation, the same numbers on every layout: each parameter is drawn whole from its own seed.

    Matrices are normal with `init_method_std`, divided by √(2·layers) where they write to the residual stream.
    """

    config: ModelConfig
    entries: list[Entry]
    seed: int

    def read(self, entry: Entry) -> Tensor:
        """Draw `entry`; norms are ones, biases zeros."""
        if len(entry.shape) == 1:
            return torch.full(entry.shape, 0.0 if entry.mcore.endswith(".bias") else 1.0)
        std = self.config.init_method_std
        if entry.shard == "row":
            std /= math.sqrt(2 * self.config.num_layers)
        generator = torch.Generator().manual_seed(self.seed + self._numbers[entry.mcore])
        return torch.empty(entry.shape).normal_(0, std, generator=generator)

    def describe(self) -> str:
        """One phrase for the log."""
        return f"random weights (seed {self.seed})"

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {entry.mcore: number for number, entry in enumerate(self.entries)}


@torch.no_grad()
def load_weights(chunks: Iterable[GPTModel], entries: Iterable[Entry], source: StartWeights, mesh: Mesh) -> None:
    """Fill this rank's parameters, one tensor at a time; what other stages and expert ranks hold is not read."""
    parameters = named_parameters(chunks)
    filled: dict[str, int] = dict.fromkeys(parameters, 0)
    for entry in entries:
        name, axis = parameter_name(entry), shard_axis(entry, mesh)
        if name not in parameters:
            continue
        if entry.expert is None:
            _fill(parameters[name], cut(entry, source.read(entry), axis.rank, axis.size))
        elif (number := local_expert(entry.expert, parameters[name], mesh)) is None:
            continue
        elif (slot := _expert_slot(parameters[name], number)) is not None:
            slot.copy_(cut(entry, source.read(entry), axis.rank, axis.size))
        filled[name] += 1
    lacking = [name for name, count in filled.items() if count != _parts(parameters[name])]
    assert not lacking, f"the manifest does not have exactly the entries of {lacking}"


def _fill(parameter: Tensor, piece: Tensor) -> None:
    if isinstance(parameter, DTensor):
        piece = piece.to(parameter.device, parameter.dtype)
        piece = distribute_tensor(piece, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(piece)


def _expert_slot(parameter: Tensor, number: int) -> Tensor | None:
    """Where a rank keeps its part of slice `number`; None where another data-parallel rank does."""
    if not isinstance(parameter, DTensor):
        return parameter[number]
    numbers = torch.arange(len(parameter), device=parameter.device)
    held = distribute_tensor(numbers, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    return parameter.to_local()[(held == number).nonzero().item()] if number in held else None


def _parts(parameter: Tensor) -> int:
    return len(parameter) if parameter.ndim == 3 else 1
