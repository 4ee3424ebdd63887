"""Micro-batches through a model of several stages: torch's 1F1B schedules, and what they lack of memory and manners."""

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from megatron_patch.data.batches import Batch
from megatron_patch.model.build import DTYPES
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.train.passes import arguments, summed_loss

Schedule = Schedule1F1B | ScheduleInterleaved1F1B
T = TypeVar("T")


class Pipeline:
    """The layers over several ranks, 1F1B: one forward, one backward. Interleaved where a rank has several chunks."""

    def __init__(self, chunks: list[GPTModel], mesh: Mesh, precision: str):
        self.chunks, self.mesh, self.precision = chunks, mesh, precision
        logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)  # prints what it raises
        self.schedule: Schedule | None = None  # made when the first micro-batches say their number and shape
        self.divisor: Tensor | None = None
        self.total = torch.zeros(())

    def __call__(self, micro_batches: list[Batch], divisor: Tensor | None = None) -> Tensor:
        """As `train.passes.Passes` says. Raises ValueError for a number of micro-batches that the schedule cannot run.

        FSDP adds gradients over data-parallel ranks when torch's schedule tells it to: after the last micro-batch.
        """
        batch = _joined(micro_batches)
        inputs = [batch.tokens.to(self.mesh.device)] if self.mesh.is_first_stage else []
        mask, given = batch.loss_mask.to(self.mesh.device), arguments(batch, self.mesh.device)
        self.divisor, self.total = divisor, torch.zeros((), device=self.mesh.device)
        self.schedule = self.schedule or self._schedule(micro_batches)
        run = self.schedule.eval if divisor is None else self.schedule.step
        run(*inputs, target=mask, return_outputs=False, **given)
        return self.total

    def _loss(self, losses: Tensor, mask: Tensor) -> Tensor:
        summed = summed_loss(losses, mask)
        self.total += summed.detach()
        return summed if self.divisor is None else summed / self.divisor

    def _schedule(self, micro_batches: list[Batch]) -> Schedule:
        stages = [self._stage(number, chunk, micro_batches[0]) for number, chunk in enumerate(self.chunks)]
        count, settings = len(micro_batches), {"loss_fn": self._loss, "scale_grads": False}
        if len(stages) > 1:
            return ScheduleInterleaved1F1B(stages, count, **settings)
        return Schedule1F1B(stages[0], count, **settings)

    def _stage(self, number: int, chunk: GPTModel, batch: Batch) -> "Stage":
        samples, length = batch.tokens.shape
        tokens = torch.empty(samples, length, dtype=torch.long, device="meta")
        losses = torch.empty(samples, length, dtype=torch.promote_types(self._dtype, torch.float32), device="meta")
        share = length // (self.mesh.tp.size if self.mesh.sequence_parallel else 1)
        stream = torch.empty(share, samples, chunk.config.hidden_size, dtype=self._dtype, device="meta")
        stream.requires_grad_()  # else the stage before would get no gradient
        return Stage(
            chunk,
            number * self.mesh.pp.size + self.mesh.pp.rank,
            len(self.chunks) * self.mesh.pp.size,
            self.mesh.device,
            input_args=tokens if chunk.is_first else stream,
            output_args=losses if chunk.is_last else stream,
            group=self.mesh.pp.group,
        )

    @property
    def _dtype(self) -> torch.dtype:
        """Of the residual stream: float32 is whatever the parameters are, which in a test may be float64."""
        return next(self.chunks[0].parameters()).dtype if self.precision == "fp32" else DTYPES[self.precision]


def _joined(micro_batches: list[Batch]) -> Batch:
    """One batch, which `Schedule.step` cuts into micro-batches again."""
    parts = {name: [vars(batch)[name] for batch in micro_batches] for name in vars(micro_batches[0])}
    return Batch(**{name: None if tensors[0] is None else torch.cat(tensors) for name, tensors in parts.items()})


class Stage(PipelineStage):
    """A stage that holds memory for what it receives only while it needs it, and raises what its model raised.

    torch's own keeps two activations for every micro-batch of a step from the first step on: for 128 micro-batches of
    4096 tokens and 4096 channels in bf16 that is 8 GiB. It also turns every exception into a RuntimeError. Everything
    that is private to torch 2.11 to 2.13 stands in this class.
    """

    def _prepare_forward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_forward_infra(1, *args, **kwargs)
        self.args_recv_info = _one_each(self.args_recv_info[0], num_microbatches)
        return prepared

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_backward_infra(1, *args, **kwargs)
        self.chunks = num_microbatches
        self.grad_recv_info = _one_each(self.grad_recv_info[0], num_microbatches)
        return prepared

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        if not self.is_first:
            _allocate(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        if self.has_backward:
            _allocate(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        sends = super().get_fwd_send_ops(fwd_chunk_id)
        if not self.has_backward:
            del self.fwd_cache[fwd_chunk_id]
        return sends

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        received = [] if self.is_first else self.args_recv_info[fwd_chunk_id]
        for info in received:
            info.buffer.requires_grad_(self.has_backward)
        output = _unwrapped(super().forward_one_chunk, fwd_chunk_id, *args, **kwargs)
        if not self.has_backward:
            self.fwd_cache[fwd_chunk_id] = (self.fwd_cache[fwd_chunk_id][0], [])
            _release(received)
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        _unwrapped(super().backward_one_chunk, bwd_chunk_id, *args, **kwargs)
        if self.has_backward:
            _release([] if self.is_first else self.args_recv_info[bwd_chunk_id])
            _release(self.grad_recv_info[bwd_chunk_id])

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        """Checks nothing: torch 2.11 compares strides even where they say nothing, and 2.13 has no such method."""


def _one_each(infos: tuple[Any, ...], count: int) -> dict[int, tuple[Any, ...]]:
    _release(info for info in infos if isinstance(getattr(info, "buffer", None), Tensor))
    return {number: tuple(copy.copy(info) for info in infos) for number in range(count)}


def _allocate(infos: Iterable[Any], device: torch.device) -> None:
    for info in infos:
        info.buffer = torch.empty_like(info.buffer, device=device)


def _release(infos: Iterable[Any]) -> None:
    for info in infos:
        info.buffer = torch.empty_like(info.buffer, device="meta")


def _unwrapped(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from error.__cause__.__cause__
