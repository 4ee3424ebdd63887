"""The weights a run starts from: read from a checkpoint, or drawn."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_patch.checkpoint.layouts import cut
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry
from megatron_patch.parallel.mesh import Axis


class Source(Protocol):
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
        """Draw `entry`; norms are ones."""
        if len(entry.shape) == 1:
            return torch.ones(entry.shape)
        std = self.config.init_method_std
        if entry.shard == "row":
            std /= math.sqrt(2 * self.config.num_layers)
        generator = torch.Generator().manual_seed(self.seed + self.entries.index(entry))
        return torch.empty(entry.shape).normal_(0, std, generator=generator)

    def describe(self) -> str:
        """One phrase for the log."""
        return f"random weights (seed {self.seed})"


@torch.no_grad()
def load_weights(model: nn.Module, entries: Iterable[Entry], source: Source, tp: Axis) -> None:
    """Fill every parameter of `model` with this rank's piece, one tensor at a time."""
    parameters = dict(model.named_parameters())
    for entry in entries:
        parameter = parameters.pop(entry.mcore)
        piece = cut(entry, source.read(entry), tp.rank, tp.size).to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            piece = distribute_tensor(piece, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(piece)
    assert not parameters, f"the manifest has no entry for {sorted(parameters)}"
