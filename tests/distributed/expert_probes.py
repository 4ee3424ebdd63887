"""Single properties of experts on ranks: tokens that fall unevenly, and what the routers say of a step."""

from typing import Any

import torch
from torch import Tensor

from layout_step import Trial, mesh_of, start
from megatron_patch.model.moe import Experts
from megatron_patch.parallel.collectives import cut_rows, join_rows
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.train.passes import build_passes
from megatron_patch.train.routing import router_fields
from megatron_patch.train.step import backward, evaluate
from tiny_models import micro_batches


def uneven_experts_of_rank(trial: Trial, tokens: list[int]) -> dict[str, Tensor]:
    """`uneven_experts` at this rank's place."""
    return uneven_experts(trial, tokens, mesh_of(trial.parallel, trial.world))


def uneven_experts(trial: Trial, tokens: list[int], mesh: Mesh) -> dict[str, Tensor]:
    """Outputs and gradients of experts whose ranks hold `tokens` of the input; the first three experts get them all."""
    experts, generator = Experts(trial.config, mesh), torch.Generator().manual_seed(11)
    for parameter in experts.parameters():
        drawn = torch.randn(trial.config.num_moe_experts, *parameter.shape[1:], generator=generator)
        parameter.data.copy_(drawn.tensor_split(mesh.ep.size)[mesh.ep.rank])
    total, topk = sum(tokens), trial.config.moe_router_topk
    x = torch.randn(total, trial.config.hidden_size, generator=generator)
    weights = torch.rand(total, topk, generator=generator)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:topk] for _ in range(total)])
    direction = torch.randn(x.shape, generator=generator)
    x, weights, chosen, direction = (t.split(tokens)[mesh.ep.rank].clone() for t in (x, weights, chosen, direction))
    out = experts(x.requires_grad_(), weights.requires_grad_(), chosen)
    out.backward(direction)
    found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    return found | {name: parameter.grad for name, parameter in experts.named_parameters()}


def rows_there_and_back(rows: int, world: int) -> tuple[int, Tensor, Tensor]:
    """How many of `rows` this rank holds once they are cut; them joined again; the gradient of both."""
    mesh = mesh_of(Trial("mistral").parallel, world)
    x = torch.arange(2.0 * rows).view(rows, 2).requires_grad_()
    piece = cut_rows(x, mesh.world)
    joined = join_rows(piece * 3, mesh.world, rows)
    joined.backward(torch.arange(2.0 * rows).view(rows, 2) + 1)
    return len(piece), joined.detach(), x.grad


def fields_of_rank(trial: Trial) -> dict[str, Any]:
    """`fields_of` at this rank's place."""
    return fields_of(trial, mesh_of(trial.parallel, trial.world))


def fields_of(trial: Trial, mesh: Mesh) -> dict[str, Any]:
    """What the routers say after a validation and a step, and that they say it once."""
    chunks, batches = start(trial, mesh), micro_batches(mesh.dp.rank, mesh.dp.size)
    passes = build_passes(chunks, mesh, trial.precision)
    evaluate(passes, [batches], mesh)
    backward(passes, batches, mesh)
    fields = router_fields(chunks, mesh)
    assert router_fields(chunks, mesh) == {}
    return fields
