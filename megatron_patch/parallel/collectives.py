"""Communication with a gradient: each function's backward is its conjugate. On an axis of size 1 all are the identity.

Sequence-parallel functions work on dimension 0: tensors are [sequence, batch, …].
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_patch.parallel.mesh import Axis
from megatron_patch.parallel.zigzag import gathered_order

# torch 2.13 warns about the names that are the only ones 2.11 knows.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Identity; the gradient is summed over `axis` (entry of a tensor-parallel region)."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Sum over `axis`; the gradient passes unchanged (exit of a tensor-parallel region)."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """[S/n, …] → [S, …]; the gradient is summed and cut back to this rank's slice."""
    return x if axis.size == 1 else _GatherSequence.apply(x, axis)


def reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """[S, …], a partial sum → [S/n, …], this rank's slice of the sum; the gradient is gathered."""
    return x if axis.size == 1 else _ReduceScatterSequence.apply(x, axis)


def cut_rows(x: Tensor, axis: Axis) -> Tensor:
    """[R, …], the same on every rank → this rank's rows of it, the last ranks fewer or none; the gradient is joined."""
    return x if axis.size == 1 else _CutRows.apply(x, axis)


def join_rows(x: Tensor, axis: Axis, rows: int) -> Tensor:
    """Each rank's rows, as `cut_rows` cuts `rows` → all of them [rows, …]; the gradient is cut."""
    return x if axis.size == 1 else _JoinRows.apply(x, axis, rows)


def exchange_rows(x: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
    """`sent[i]` rows of x go to rank i, in order → `received[i]` rows from rank i, in order. The gradient goes back."""
    return x if axis.size == 1 else _ExchangeRows.apply(x, axis, sent, received)


def exchange(x: Tensor, axis: Axis) -> Tensor:
    """x [n, …]: row i goes to rank i → row i is from rank i; no gradient."""
    return x if axis.size == 1 else _exchange_rows(x, axis, None, None)


def gather_zigzag(x: Tensor, axis: Axis) -> Tensor:
    """[S/n, …], the chunks that `zigzag.held` gives this rank → [S, …] in order; the gradient is summed and cut."""
    if axis.size == 1:
        return x
    chunks = gather_sequence(x, axis).chunk(2 * axis.size)
    return torch.cat([chunks[number] for number in gathered_order(axis.size)])


def sum_(x: Tensor, axis: Axis) -> Tensor:
    """Sum over `axis` in place; no gradient."""
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


def max_(x: Tensor, axis: Axis) -> Tensor:
    """Maximum over `axis` in place; no gradient."""
    if axis.size > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=axis.group)
    return x


def _gather(x: Tensor, axis: Axis) -> Tensor:
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    _ALL_GATHER(out, x.contiguous(), group=axis.group)
    return out


def _reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    if x.shape[0] % axis.size:
        raise ValueError(f"a sequence of {x.shape[0]} tokens cannot be cut into {axis.size} equal slices")
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    _REDUCE_SCATTER(out, x.contiguous(), group=axis.group)
    return out


def _slice_of_rank(rows: int, axis: Axis) -> slice:
    height = -(-rows // axis.size)
    return slice(axis.rank * height, (axis.rank + 1) * height)


def _join_rows(x: Tensor, axis: Axis, rows: int) -> Tensor:
    height = -(-rows // axis.size)
    padded = x if len(x) == height else torch.cat([x, x.new_zeros(height - len(x), *x.shape[1:])])
    return _gather(padded, axis)[:rows]


def _exchange_rows(x: Tensor, axis: Axis, sent: list[int] | None, received: list[int] | None) -> Tensor:
    out = torch.empty_like(x) if received is None else x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=axis.group)
    return out


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return sum_(grad.clone(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return sum_(x.clone(), axis)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return _gather(x, axis)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.axis), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return _reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.axis), None


class _CutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis, ctx.rows = axis, len(x)
        return x[_slice_of_rank(len(x), axis)].clone()

    @staticmethod
    def backward(ctx, grad):
        return _join_rows(grad, ctx.axis, ctx.rows), None


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, rows):
        ctx.axis = axis
        return _join_rows(x, axis, rows)

    @staticmethod
    def backward(ctx, grad):
        return grad[_slice_of_rank(len(grad), ctx.axis)], None, None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, sent, received):
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return _exchange_rows(x, axis, sent, received)

    @staticmethod
    def backward(ctx, grad):
        return _exchange_rows(grad, ctx.axis, ctx.received, ctx.sent), None, None, None
