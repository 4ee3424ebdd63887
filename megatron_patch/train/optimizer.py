"""AdamW on this rank's shards, and the global gradient norm."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.families.manifest import Entry
from megatron_patch.parallel.collectives import sum_
from megatron_patch.parallel.mesh import Axis, Mesh
from megatron_patch.train.parameters import parameter_name


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.AdamW:
    """Matrices decay, vectors (norms) do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a parameter or gradient, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def sum_sequence_parallel_gradients(model: nn.Module, entries: Iterable[Entry], tp: Axis) -> None:
    """Norms ran on this rank's tokens only: add up what the tensor-parallel ranks found."""
    parameters = dict(model.named_parameters())
    partial = [local(parameters[e.mcore].grad) for e in entries if e.shard is None and e.mcore in parameters]
    if tp.size == 1 or not partial:
        return
    flat = sum_(torch.cat([gradient.flatten() for gradient in partial]), tp)
    for gradient, total in zip(partial, flat.split([gradient.numel() for gradient in partial]), strict=True):
        gradient.copy_(total.view_as(gradient))


@torch.no_grad()
def clip_gradients(model: nn.Module, entries: Iterable[Entry], mesh: Mesh, *, limit: float, sharded: bool) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `limit` (0: only measure). Returns the norm before.

    Every element counts once: what tensor-parallel ranks replicate, or data-parallel ranks when not `sharded`,
    is not added up over them.
    """
    shards = {parameter_name(entry): entry.shard for entry in entries}
    named = [(name, local(p.grad)) for name, p in model.named_parameters()]
    cut = _squared_norm([g for name, g in named if shards[name] is not None], mesh.device)
    whole = _squared_norm([g for name, g in named if shards[name] is None], mesh.device)
    total = sum_(cut, mesh.tp) + whole
    if sharded:
        total = sum_(total, mesh.dp)
    norm = total.sqrt()
    if limit > 0:
        torch._foreach_mul_([g for _, g in named], torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm


def _squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    norms = torch._foreach_norm([g for g in gradients if g.numel()])
    return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
