"""What a pipeline does besides its arithmetic, seen from one of its ranks."""

import time
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layout_step import Trial, start
from megatron_patch.parallel.grid import resolve_grid
from megatron_patch.parallel.mesh import Mesh, build_mesh
from megatron_patch.train.passes import Passes, build_passes
from megatron_patch.train.pipeline import Pipeline
from megatron_patch.train.step import backward, evaluate
from tiny_models import micro_batches

TIMEOUT = 3.0


@dataclass(frozen=True)
class Seen:
    """On one rank. `validations`: the loss before and after a backward; `kept`: devices of what stages received."""

    stage: int
    validations: tuple[float, float]
    reductions: int
    kept: set[str]
    error: Exception | None
    seconds: float


class Operators(TorchDispatchMode):
    """Writes down the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def probe(trial: Trial) -> Seen:
    """Validate around a step, then take another one in which the last stage raises."""
    parallel = trial.parallel
    mesh = build_mesh(
        resolve_grid(parallel, trial.world),
        torch.device("cpu"),
        sharded=parallel.use_distributed_optimizer,
        sequence_parallel=parallel.sequence_parallel,
        timeout_minutes=TIMEOUT / 60,
    )
    passes = build_passes(start(trial, mesh), mesh, trial.precision)
    batches = micro_batches(mesh.dp.rank, mesh.dp.size)
    before = evaluate(passes, [batches, batches], mesh)
    with Operators() as called:
        backward(passes, batches, mesh)
    reductions = sum("reduce_scatter" in name for name in called.names)
    validations = (before, evaluate(passes, [batches], mesh))
    kept = received(passes)
    begun = time.monotonic()
    error = failing_step(passes, batches, mesh)
    return Seen(mesh.pp.rank, validations, reductions, kept, error, time.monotonic() - begun)


def received(passes: Passes) -> set[str]:
    """The devices of the tensors into which stages receive."""
    assert isinstance(passes, Pipeline)
    stages = passes.schedule._stages
    known = [infos for stage in stages for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values())]
    return {info.buffer.device.type for infos in known for info in infos if getattr(info, "buffer", None) is not None}


def failing_step(passes: Passes, batches: list, mesh: Mesh) -> Exception | None:
    """What this rank raises when the last stage cannot compute its third micro-batch."""
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("the third micro-batch is bad")

    if mesh.pp.rank == mesh.pp.size - 1:
        passes.chunks[-1].decoder.register_forward_pre_hook(fail)
    try:
        backward(passes, batches, mesh)
    except Exception as error:
        return error
    return None
