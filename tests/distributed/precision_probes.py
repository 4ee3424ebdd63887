"""What a rank finds of half precision, of what is kept of a pass, and of compiled layers, each beside the plain way."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layout_step import Trial, mesh_of, pieces_of, run_config, start
from megatron_patch.data.batches import Batch
from megatron_patch.model.compilation import compile_layers
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.train.finite import Streak
from megatron_patch.train.loss_scale import LossScale
from megatron_patch.train.optimizer import build_optimizer, finish_gradients, gradient_norm
from megatron_patch.train.passes import Passes, build_passes
from megatron_patch.train.routing import router_fields
from megatron_patch.train.step import backward, train_step
from megatron_patch.weights.parameters import local, named_parameters
from tiny_models import micro_batches


@dataclass(frozen=True)
class Gradients:
    """Loss, norm, gradients by entry and what the routers say, of one backward; data types of the master's tensors."""

    loss: float
    norm: float
    of: dict[str, Tensor]
    fields: dict[str, Any]
    dtypes: set[torch.dtype]


def gradients(trial: Trial, mesh: Mesh, scale: float = 1.0, *, is_compiled: bool = False) -> Gradients:
    """Of `trial` at this rank's place, found with the loss times `scale` and divided by it again."""
    chunks = start(trial, mesh)
    if is_compiled:
        compile_layers(chunks, backend="aot_eager", fullgraph=True)
    loss = backward(build_passes(chunks, mesh, trial.precision), _batches(mesh), mesh, scale)
    finish_gradients(chunks, trial.entries, mesh)
    is_sharded = trial.parallel.use_distributed_optimizer
    norm = gradient_norm(chunks, trial.entries, mesh, sharded=is_sharded, loss_scale=scale)
    parameters = named_parameters(chunks).values()
    dtypes = {tensor.dtype for parameter in parameters for tensor in (parameter, parameter.grad)}
    pieces = pieces_of(chunks, mesh, lambda parameter: parameter.grad / scale)
    return Gradients(float(loss), float(norm), pieces, router_fields(chunks, mesh), dtypes)


def gradients_of_rank(trial: Trial, scale: float = 1.0) -> Gradients:
    """`gradients` at this rank's place."""
    return gradients(trial, mesh_of(trial.parallel, trial.world), scale)


def both_ways(plain: Trial, other: Trial, *, is_compiled: bool = False) -> tuple[Gradients, Gradients]:
    """The gradients of `plain`, and of `other`, a trial on the same layout, compiled or not."""
    mesh = mesh_of(plain.parallel, plain.world)
    return gradients(plain, mesh), gradients(other, mesh, is_compiled=is_compiled)


def compiled_and_not(trial: Trial) -> tuple[Gradients, Gradients, int]:
    """The gradients of plain and of compiled layers, and the number of their graphs."""
    from torch._dynamo.utils import counters

    plain, compiled = both_ways(trial, trial, is_compiled=True)
    return plain, compiled, counters["stats"]["unique_graphs"]


def weights_after(trials: list[Trial], steps: int) -> list[dict[str, Tensor]]:
    """This rank's pieces of the parameters of each trial after `steps` steps."""
    found = []
    for trial in trials:
        mesh = mesh_of(trial.parallel, trial.world)
        run, chunks = run_config(trial), start(trial, mesh)
        passes, optimizer = build_passes(chunks, mesh, trial.precision), build_optimizer(run.optimizer, chunks)
        for _ in range(steps):
            train_step(run, passes, optimizer, trial.entries, _batches(mesh), mesh, LossScale.of(trial.precision))
        found.append(pieces_of(chunks, mesh, lambda parameter: parameter.data))
    return found


class Overflowing:
    """Passes after whose backward one element of one gradient of one rank is infinite."""

    def __init__(self, passes: Passes, is_here: bool):
        self.passes, self.chunks, self.is_here = passes, passes.chunks, is_here

    def __call__(self, batches: list[Batch], divisor: Tensor | None = None) -> Tensor:
        total = self.passes(batches, divisor)
        if self.is_here:
            gradient = next(iter(named_parameters(self.chunks).values())).grad
            local(gradient).view(-1)[0] = math.inf
        return total


@dataclass(frozen=True)
class Step:
    """A step's loss scale, the one after it, whether a weight or a moment changed, what the log counts and a streak."""

    scale: float
    next_scale: float
    is_changed: bool
    skipped: float
    is_loss_finite: bool
    streak: int


def steps_with_overflows(trial: Trial, overflows: list[bool], rank: int, scale: float) -> list[Step]:
    """A step for each of `overflows`, of which those that are true overflow on `rank` alone."""
    mesh = mesh_of(trial.parallel, trial.world)
    run, chunks, scaler, streak = run_config(trial), start(trial, mesh), LossScale(True, scale), Streak(limit=2)
    passes, optimizer = build_passes(chunks, mesh, trial.precision), build_optimizer(run.optimizer, chunks)
    found, before = [], _state(chunks, optimizer)
    for is_overflow in overflows:
        taken = Overflowing(passes, is_overflow and mesh.rank == rank)
        result = train_step(run, taken, optimizer, trial.entries, _batches(mesh), mesh, scaler)
        streak.add(result, scaler)
        after, skipped = _state(chunks, optimizer), result.fields()["number of skipped iterations"]
        is_changed = after.keys() != before.keys() or any(not torch.equal(after[n], before[n]) for n in after)
        step = Step(result.loss_scale, scaler.value, is_changed, skipped, result.is_loss_finite, streak.length)
        found, before = [*found, step], after
    return found


def _state(chunks: list[torch.nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in named_parameters(chunks).items():
        state = optimizer.state.get(parameter, {})
        for of, tensor in {"weight": parameter, **state}.items():
            found[f"{name} {of}"] = local(tensor).detach().clone()
    return found


def _batches(mesh: Mesh) -> list[Batch]:
    return micro_batches(mesh.dp.rank, mesh.dp.size)
