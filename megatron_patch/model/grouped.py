"""The arithmetic of rows in order of their expert: sorting, copying, grouped products, weighting, adding up.

Shapes: T tokens, K experts of a token, R = T·K rows in order of their expert, E experts, H hidden, F expert width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPED_MM_BYTES = 16  # torch.nn.functional.grouped_mm wants its strides to be multiples of it


class GroupedLinear(nn.Module):
    """One linear layer per expert, weight [E, out, in]; rows come sorted by expert."""

    def __init__(self, experts: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))

    def forward(self, rows_RI: Tensor, ends_E: Tensor) -> Tensor:
        """rows [R, in] → [R, out]; those of expert e end before row `ends_E[e]` (int32), the last end is R."""
        return grouped_product(rows_RI, self.weight.transpose(1, 2), ends_E)


def grouped_product(rows_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the matrix of its expert: one kernel where torch has it, else a loop over the experts."""
    widths = [width * rows_RI.element_size() for width in weight_EIO.shape[1:]]
    is_aligned = all(width % GROUPED_MM_BYTES == 0 for width in widths)
    if rows_RI.dtype in GROUPED_MM_DTYPES and is_aligned and len(rows_RI):
        return F.grouped_mm(rows_RI, weight_EIO, offs=ends_E)
    return looped_product(rows_RI, weight_EIO, ends_E)


def looped_product(rows_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """What `grouped_product` computes, expert by expert, for any type and width."""
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    return torch.cat([rows @ matrix for rows, matrix in zip(rows_RI.split(sizes), weight_EIO.unbind(), strict=True)])


def sort_by_expert(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which token-and-choice each row holds [R], in which row each choice stands [T, K], where each expert ends [E]."""
    sorted_R, order_R = experts_TK.flatten().sort(stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    numbers = torch.arange(experts, dtype=sorted_R.dtype, device=sorted_R.device)
    ends_E = torch.searchsorted(sorted_R, numbers, right=True, out_int32=True)
    return order_R, place_R.view_as(experts_TK), ends_E


def spread(x_TH: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
    """A copy of each token for each of its experts, in the order that `sort_by_expert` found."""
    return _Spread.apply(x_TH, order_R, place_TK)


def gather(rows_RH: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
    """The sum [T, H] of each token's rows: the transpose of `spread`."""
    return _Gather.apply(rows_RH, order_R, place_TK)


def weighted_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) · up · weight [R, F] of x [R, 2F] = [gate, up] and weight [R]."""
    return _WeightedSwiGLU.apply(x, weight)


def _rows_of_tokens(x_TH: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
    return x_TH.index_select(0, order_R // place_TK.shape[1])


def _sum_over_choices(rows_RH: Tensor, place_TK: Tensor) -> Tensor:
    return F.embedding_bag(place_TK, rows_RH, mode="sum")


class _Spread(torch.autograd.Function):
    """Gradients are added up in a fixed order: no atomics."""

    @staticmethod
    def forward(ctx, x_TH, order_R, place_TK):
        ctx.save_for_backward(place_TK)
        return _rows_of_tokens(x_TH, order_R, place_TK)

    @staticmethod
    def backward(ctx, grad_RH):
        (place_TK,) = ctx.saved_tensors
        return _sum_over_choices(grad_RH, place_TK), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, order_R, place_TK):
        ctx.save_for_backward(order_R, place_TK)
        return _sum_over_choices(rows_RH, place_TK)

    @staticmethod
    def backward(ctx, grad_TH):
        return _rows_of_tokens(grad_TH, *ctx.saved_tensors), None, None


class _WeightedSwiGLU(torch.autograd.Function):
    """Keeps only its inputs. The gradient of x takes the place of x, the largest tensor of a layer."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weight.unsqueeze(-1))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        active, grad_active = F.silu(gate), grad * up
        grad_weight = torch.linalg.vecdot(active.to(weight.dtype), grad_active.to(weight.dtype))
        scale = weight.unsqueeze(-1)
        torch.mul(active, grad, out=up).mul_(scale)
        torch.ops.aten.silu_backward.grad_input(grad_active.mul_(scale), gate, grad_input=gate)
        return x, grad_weight
