"""Micro-batches through the model: the one definition of the loss, and the way through a model of one stage."""

from typing import Protocol

import torch
from torch import Tensor

from megatron_patch.data.batches import Batch
from megatron_patch.model.build import synchronise_gradients
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import Mesh


class Passes(Protocol):
    """Forward and backward of a step's micro-batches, however many stages the model has."""

    chunks: list[GPTModel]

    def __call__(self, micro_batches: list[Batch], divisor: Tensor | None = None) -> Tensor:
        """The loss summed over the unmasked tokens, or this rank's part of it: 0 without the last chunk.

        With a `divisor`, the gradients of this sum divided by it are added to the parameters', and over data-parallel
        ranks once, after the last micro-batch.
        """


class OneStage:
    """The whole model on every rank: one micro-batch after the other."""

    def __init__(self, chunks: list[GPTModel], mesh: Mesh):
        self.chunks, self.mesh = chunks, mesh

    def __call__(self, micro_batches: list[Batch], divisor: Tensor | None = None) -> Tensor:
        """As `Passes` says."""
        (model,), device = self.chunks, self.mesh.device
        total = torch.zeros((), device=device)
        for number, batch in enumerate(micro_batches, 1):
            losses = model(batch.tokens.to(device), **arguments(batch, device))
            summed = summed_loss(losses, batch.loss_mask.to(device))
            if divisor is not None:
                synchronise_gradients(self.chunks, number == len(micro_batches))
                (summed / divisor).backward()
            total += summed.detach()
        return total


def build_passes(chunks: list[GPTModel], mesh: Mesh, precision: str) -> Passes:
    """Once per run: every step has the same number of micro-batches, of the same shape."""
    if mesh.pp.size == 1:
        return OneStage(chunks, mesh)
    from megatron_patch.train.pipeline import Pipeline  # slow to import, and one stage needs none of it

    return Pipeline(chunks, mesh, precision)


def arguments(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What every chunk is told of `batch` besides its input, by name."""
    known = {"labels_BS": batch.labels, "starts_BS": batch.starts}
    return {name: tensor.to(device) for name, tensor in known.items() if tensor is not None}


def summed_loss(losses: Tensor, mask: Tensor) -> Tensor:
    """Over the unmasked tokens, of the loss per token [B, S] that the last chunk returns."""
    return (losses * mask).sum()
