"""Steps whose loss or gradient is not finite: how many in a row, and the module where it begins."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.train.loss_scale import LEAST, LossScale
from megatron_patch.train.step import StepResult
from megatron_patch.weights.parameters import local, named_parameters


@dataclass
class Streak:
    """How many of the last steps in a row were not finite, of which a run endures fewer than `limit`."""

    limit: int
    length: int = 0

    def add(self, result: StepResult, scale: LossScale) -> None:
        """Count a step. An overflow that only says that float16's loss scale was too large is none."""
        if result.is_finite:
            self.length = 0
        elif not (scale.is_dynamic and result.is_loss_finite and result.loss_scale > LEAST):
            self.length += 1

    @property
    def is_over(self) -> bool:
        """Whether the run should end."""
        return self.length >= self.limit


class Finding(NamedTuple):
    """Something that is not finite. The least one is where it began: activations come before gradients, and of these
    the last layer's first."""

    is_gradient: bool
    place: tuple[int, int]  # first layer of the chunk, number within it; both negative for a gradient
    rank: int
    what: str


def origin(chunks: Sequence[GPTModel], mesh: Mesh, again: Callable[[], object]) -> str:
    """Where the values of the step that `again` repeats are not finite at first, over all ranks, which all call this.

    Weights must be those that the step began with. Costs a step, several times as slow.
    """
    for parameter in named_parameters(chunks).values():
        parameter.grad = None
    with _observed(chunks, mesh.rank) as findings, torch.compiler.set_stance("force_eager"):
        again()
    for number, (name, parameter) in enumerate(named_parameters(chunks).items()):
        if parameter.grad is not None and not _is_finite(local(parameter.grad)):
            findings.append(Finding(True, (1, number), mesh.rank, f"the gradient of {name}"))  # after all activations'
    found = [min(findings)] if findings else []
    if mesh.world.size > 1:
        of_ranks: list[list[Finding]] = [[]] * mesh.world.size
        dist.all_gather_object(of_ranks, found, group=mesh.world.group)
        found = [finding for of_rank in of_ranks for finding in of_rank]
    if not found:
        return "the same step again had only finite values: suspect the hardware"
    return f"the first value that is not finite is {min(found).what}, on rank {min(found).rank}"


@contextmanager
def _observed(chunks: Sequence[GPTModel], rank: int) -> Iterator[list[Finding]]:
    """While open, every module's output and its gradient are looked at as they are computed."""
    findings: list[Finding] = []
    handles = []
    for chunk in chunks:
        observer = _Observer(findings, chunk.layers.start, rank)
        for name, module in chunk.named_modules():
            after = partial(observer.after_forward, name or "the loss")
            handles.append(module.register_forward_hook(after))
    try:
        yield findings
    finally:
        for handle in handles:
            handle.remove()


class _Observer:
    """Looks at what the modules of one chunk compute; a module's parts are done, and seen, before it."""

    def __init__(self, findings: list[Finding], first_layer: int, rank: int):
        self.findings, self.first_layer, self.rank = findings, first_layer, rank
        self.seen = 0
        self.last_origin: object = None

    def after_forward(self, name: str, module: nn.Module, given: object, output: object) -> None:
        """A forward hook."""
        for tensor in output if isinstance(output, tuple) else (output,):
            if not isinstance(tensor, Tensor):
                continue
            self.seen += 1
            if not _is_finite(tensor):
                self._found(False, (self.first_layer, self.seen), f"the output of {name}")
            if tensor.requires_grad and tensor.grad_fn is not self.last_origin:  # else it is its last part's output
                self.last_origin = tensor.grad_fn
                tensor.register_hook(partial(self.after_backward, name, (-self.first_layer, -self.seen)))

    def after_backward(self, name: str, place: tuple[int, int], gradient: Tensor) -> None:
        """A tensor's hook."""
        if not _is_finite(gradient):
            self._found(True, place, f"the gradient of the output of {name}")

    def _found(self, is_gradient: bool, place: tuple[int, int], what: str) -> None:
        self.findings.append(Finding(is_gradient, place, self.rank, what))


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
