"""AdamW on this rank's shards, and what its gradients still need once the last backward is done."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.families.manifest import EMBEDDING, Entry
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.collectives import sum_
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.weights.parameters import local, named_parameters, parameter_name


def build_optimizer(config: OptimizerConfig, chunks: Iterable[GPTModel]) -> torch.optim.AdamW:
    """Matrices decay, vectors (norms, biases) do not."""
    parameters = list(named_parameters(chunks).values())
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


@torch.no_grad()
def finish_gradients(chunks: Iterable[GPTModel], entries: Iterable[Entry], mesh: Mesh) -> None:
    """Add up what FSDP does not know of: parts found by tensor-parallel ranks, and by both ends of the pipeline."""
    parameters = named_parameters(chunks)
    if mesh.sequence_parallel:  # what every rank holds whole ran on its own tokens only
        whole = [local(parameters[e.mcore].grad) for e in entries if e.shard is None and e.mcore in parameters]
        _sum_flat(whole, mesh)
    if mesh.embedding.size > 1 and EMBEDDING in parameters and _is_tied(chunks):
        gradient = local(parameters[EMBEDDING].grad)
        gradient.copy_(sum_(gradient.to(mesh.device), mesh.embedding))


@torch.no_grad()
def gradient_norm(
    chunks: Iterable[GPTModel], entries: Iterable[Entry], mesh: Mesh, *, sharded: bool, loss_scale: float = 1.0
) -> Tensor:
    """The global 2-norm of all gradients, divided by `loss_scale`.

    A gradient that several ranks hold adds its part by the share of each. `sharded`: data-parallel ranks hold pieces,
    not copies.
    """
    gradients = {name: local(p.grad) for name, p in named_parameters(chunks).items()}
    # A layer's experts share a parameter: the first stands for all of them, which may be ten thousands.
    copies = {parameter_name(entry): _copies(entry, mesh, sharded) for entry in entries if not entry.expert}
    if not mesh.is_first_stage and _is_tied(chunks):
        gradients.pop(EMBEDDING, None)  # stages between the ends hold none
    return sum_(_squared_norm(gradients, copies, mesh.device), mesh.world).sqrt() / loss_scale


def update(optimizer: torch.optim.AdamW, norm: float, *, limit: float, loss_scale: float = 1.0) -> None:
    """Step with all gradients divided by `loss_scale` and scaled so that `norm`, theirs, is at most `limit` (0: any).

    Fused AdamW does both as it reads them, on every device, as PyTorch's own GradScaler asks it to; it leaves `grad`
    divided.
    """
    excess = max((norm + 1e-6) / limit, 1.0) if limit > 0 else 1.0
    optimizer.grad_scale = torch.tensor(loss_scale * excess, dtype=torch.float32) if loss_scale * excess != 1 else None
    optimizer.step()


def _copies(entry: Entry, mesh: Mesh, sharded: bool) -> int:
    """How many ranks hold the same element of a gradient."""
    if entry.expert is not None:
        return 1 if sharded else mesh.edp.size
    return (mesh.tp.size if entry.shard is None else 1) * (1 if sharded else mesh.dp_cp.size)


def _is_tied(chunks: Iterable[GPTModel]) -> bool:
    return any(chunk.config.share_embeddings_and_output_weights for chunk in chunks)


def _sum_flat(gradients: list[Tensor], mesh: Mesh) -> None:
    flat = sum_(torch.cat([gradient.flatten().to(mesh.device) for gradient in gradients]), mesh.tp)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _squared_norm(gradients: dict[str, Tensor], copies: dict[str, int], device: torch.device) -> Tensor:
    """What this rank adds, on `device`. What stands in host memory crosses over once, as one number."""
    totals = {device: torch.zeros((), device=device)}
    for count in sorted(set(copies.values())):
        for place, held in _by_device(g for name, g in gradients.items() if copies[name] == count).items():
            share = torch.stack(torch._foreach_norm(held)).square().sum() / count
            totals[place] = totals[place] + share if place in totals else share
    return torch.stack([total.to(device) for total in totals.values()]).sum()


def _by_device(gradients: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    """Those that are not empty; offloaded ones stand in host memory."""
    found: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():
            found.setdefault(gradient.device, []).append(gradient)
    return found
