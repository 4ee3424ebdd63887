"""One optimizer step and one validation pass."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_patch.config.run import RunConfig
from megatron_patch.data.batches import Batch
from megatron_patch.families.manifest import Entry
from megatron_patch.model.auxiliary import set_auxiliary_scale
from megatron_patch.parallel.collectives import sum_
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.train.loss_scale import LossScale
from megatron_patch.train.optimizer import finish_gradients, gradient_norm, update
from megatron_patch.train.passes import Passes
from megatron_patch.train.sequence import cut_sequence


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the global batch's unmasked tokens, the gradient norm before clipping, and the loss scale."""

    loss: float
    gradient_norm: float
    loss_scale: float = 1.0

    @property
    def is_loss_finite(self) -> bool:
        """Of a loss that is not, nothing is learned by another loss scale."""
        return math.isfinite(self.loss)

    @property
    def is_finite(self) -> bool:
        """Whether weights were updated: no rank found NaN or infinity. Loss and norm are the same on every rank."""
        return self.is_loss_finite and math.isfinite(self.gradient_norm)

    def fields(self) -> dict[str, float]:
        """What the log shows of it, by Megatron's names."""
        return {
            "lm loss": self.loss,
            "loss scale": self.loss_scale,
            "grad norm": self.gradient_norm,
            "number of skipped iterations": int(not self.is_finite),
            "number of nan iterations": int(not self.is_loss_finite),
        }


def train_step(
    run: RunConfig,
    passes: Passes,
    optimizer: torch.optim.AdamW,
    entries: list[Entry],
    micro_batches: list[Batch],
    mesh: Mesh,
    scale: LossScale,
) -> StepResult:
    """Accumulate the micro-batches' gradients, clip, update; a step that is not finite leaves the weights alone."""
    optimizer.zero_grad(set_to_none=True)
    loss = backward(passes, micro_batches, mesh, scale.value)
    finish_gradients(passes.chunks, entries, mesh)
    sharded = run.parallel.use_distributed_optimizer
    norm = gradient_norm(passes.chunks, entries, mesh, sharded=sharded, loss_scale=scale.value)
    result = StepResult(loss.item(), norm.item(), scale.value)
    if result.is_finite:
        update(optimizer, result.gradient_norm, limit=run.optimizer.clip_grad, loss_scale=scale.value)
    scale.update(result.is_finite)
    return result


def backward(passes: Passes, micro_batches: list[Batch], mesh: Mesh, loss_scale: float = 1.0) -> Tensor:
    """Gradients, times `loss_scale`, of the mean loss over the global batch's unmasked tokens. Returns that loss.

    The number of tokens is known before the first forward, so that the result depends neither on how samples fall
    into micro-batches nor on the ranks that hold them.
    """
    tokens = _token_count(micro_batches, mesh).clamp(min=1)  # a batch with nothing to learn has loss 0
    set_auxiliary_scale(passes.chunks, loss_scale / (len(micro_batches) * mesh.dp.size))
    return _over_ranks(passes(_cut(micro_batches, mesh), tokens / loss_scale), mesh) / tokens


@torch.no_grad()
def evaluate(passes: Passes, batches: Iterable[list[Batch]], mesh: Mesh) -> float:
    """Mean loss over the unmasked tokens of `batches`, of all data-parallel ranks."""
    loss, tokens = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for micro_batches in batches:
        loss += passes(_cut(micro_batches, mesh))
        tokens += _token_count(micro_batches, mesh)
    if not tokens:
        raise ValueError("the validation data has no token to predict; check VALID_DATASET_PATH")
    return (_over_ranks(loss, mesh) / tokens).item()


def _cut(micro_batches: list[Batch], mesh: Mesh) -> list[Batch]:
    return [cut_sequence(batch, mesh.cp) for batch in micro_batches]


def _over_ranks(total: Tensor, mesh: Mesh) -> Tensor:
    """The sum of what the ranks found in their samples, their parts of sequences, and their last stages."""
    return sum_(sum_(total, mesh.dp_cp), mesh.pp)


def _token_count(micro_batches: list[Batch], mesh: Mesh) -> Tensor:
    """Unmasked tokens of the global batch."""
    return sum_(torch.stack([batch.loss_mask.sum() for batch in micro_batches]).sum().to(mesh.device), mesh.dp)
