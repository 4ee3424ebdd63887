"""One optimizer step and one validation pass."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_patch.config.run import RunConfig
from megatron_patch.data.batches import Batch
from megatron_patch.families.manifest import Entry
from megatron_patch.model.build import synchronise_gradients
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.collectives import sum_
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.train.optimizer import clip_gradients, finish_gradients


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the global batch's unmasked tokens, and the gradient norm before clipping."""

    loss: float
    gradient_norm: float

    def fields(self) -> dict[str, float]:
        """What the log shows of it, by Megatron's names."""
        return {"lm loss": self.loss, "grad norm": self.gradient_norm}


def train_step(
    run: RunConfig,
    chunks: list[GPTModel],
    optimizer: torch.optim.Optimizer,
    entries: list[Entry],
    micro_batches: list[Batch],
    mesh: Mesh,
) -> StepResult:
    """Accumulate the micro-batches' gradients, clip, update."""
    optimizer.zero_grad(set_to_none=True)
    loss = backward(chunks, micro_batches, mesh)
    finish_gradients(chunks, entries, mesh)
    norm = clip_gradients(
        chunks,
        entries,
        mesh,
        limit=run.optimizer.clip_grad,
        sharded=run.parallel.use_distributed_optimizer,
    )
    optimizer.step()
    return StepResult(loss.item(), norm.item())


def check_finite(iteration: int, result: StepResult) -> None:
    """Raise ValueError once the weights are spoiled: what stands on disk is better than anything saved from now on."""
    if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
        raise ValueError(
            f"iteration {iteration}: the loss is {result.loss} and the gradient norm {result.gradient_norm}; "
            "nothing more is saved. Lower LR, or check the data and the start weights"
        )


def backward(chunks: list[GPTModel], micro_batches: list[Batch], mesh: Mesh) -> Tensor:
    """Gradients of the mean loss over the global batch's unmasked tokens. Returns that loss.

    The number of tokens is known before the first forward, so that the result depends neither on how samples fall
    into micro-batches nor on the ranks that hold them.
    """
    tokens = _token_count(micro_batches, mesh)
    total = torch.zeros((), device=mesh.device)
    (model,) = chunks
    for number, batch in enumerate(micro_batches, 1):
        synchronise_gradients(chunks, number == len(micro_batches))
        loss = _summed_loss(model, batch, mesh) / tokens
        loss.backward()
        total += loss.detach()
    return _over_ranks(total, mesh)


@torch.no_grad()
def evaluate(chunks: list[GPTModel], batches: Iterable[list[Batch]], mesh: Mesh) -> float:
    """Mean loss over the unmasked tokens of `batches`, of all data-parallel ranks."""
    (model,) = chunks
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for micro_batches in batches:
        for batch in micro_batches:
            total[0] += _summed_loss(model, batch, mesh)
            total[1] += batch.loss_mask.sum()
    loss, tokens = _over_ranks(total, mesh).tolist()
    if not tokens:
        raise ValueError("the validation data has no token to predict; check VALID_DATASET_PATH")
    return loss / tokens


def _over_ranks(total: Tensor, mesh: Mesh) -> Tensor:
    """The sum of what the ranks found in their samples, their parts of sequences, and their last stages."""
    return sum_(sum_(total, mesh.dp_cp), mesh.pp)


def _token_count(micro_batches: list[Batch], mesh: Mesh) -> Tensor:
    count = torch.stack([batch.loss_mask.sum() for batch in micro_batches]).sum().to(mesh.device)
    return sum_(count, mesh.dp).clamp(min=1)  # a batch with nothing to learn has loss 0


def _summed_loss(model: GPTModel, batch: Batch, mesh: Mesh) -> Tensor:
    losses = model(batch.tokens.to(mesh.device), batch.labels.to(mesh.device))
    return (losses * batch.loss_mask.to(mesh.device)).sum()
