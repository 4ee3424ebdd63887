"""A mixture of experts in place of the MLP: routed without dropping a token, plus an expert that every token passes.

Shapes: T tokens, K experts of a token, R = T·K rows in order of their expert, E experts, H hidden, F expert width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.linear import ColumnLinear, RowLinear
from megatron_patch.model.mlp import swiglu, swiglu_gradient
from megatron_patch.model.router import TopKRouter
from megatron_patch.parallel.mesh import Mesh


class MoE(nn.Module):
    """Router, experts, and the shared expert where there is one. Not cut over ranks."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        assert mesh.tp.size == 1, "experts are not distributed over tensor-parallel ranks"
        self.router = TopKRouter(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExperts(config, mesh) if config.moe_shared_expert_intermediate_size else None

    def forward(self, x: Tensor) -> Tensor:
        """x [S, B, H] → the same shape."""
        x_TH = x.flatten(0, 1)
        out_TH = self.experts(x_TH, *self.router(x_TH))
        if self.shared_experts is not None:
            out_TH = out_TH + self.shared_experts(x_TH)
        return out_TH.view_as(x)


class SharedExperts(nn.Module):
    """A gated MLP that every token passes, weighted by a sigmoid of the token if `moe_shared_expert_gate`."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        width = config.moe_shared_expert_intermediate_size
        self.linear_fc1 = ColumnLinear(config.hidden_size, 2 * width, mesh.tp, mesh.sequence_parallel)
        self.linear_fc2 = RowLinear(width, config.hidden_size, mesh.tp, mesh.sequence_parallel)
        gate = nn.Parameter(torch.empty(1, config.hidden_size)) if config.moe_shared_expert_gate else None
        self.register_parameter("gate_weight", gate)

    def forward(self, x_TH: Tensor) -> Tensor:
        out_TH = self.linear_fc2(swiglu(self.linear_fc1(x_TH)))
        return out_TH if self.gate_weight is None else out_TH * F.linear(x_TH, self.gate_weight).sigmoid()


class Experts(nn.Module):
    """All routed experts, each matrix of theirs in one parameter: one grouped product instead of E small ones."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, hidden, width = config.num_moe_experts, config.hidden_size, config.moe_ffn_hidden_size
        self.linear_fc1 = GroupedLinear(experts, hidden, 2 * width)
        self.linear_fc2 = GroupedLinear(experts, width, hidden)

    def forward(self, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The weighted sum [T, H] of what each token's experts make of it.

        Weights are applied between the two matrices, where rows are narrower and still in order of their expert.
        """
        order_R, place_TK, ends_E = sort_by_expert(experts_TK, len(self.linear_fc1.weight))
        rows_RH = _Spread.apply(x_TH, order_R, place_TK)
        hidden_RF = _WeightedSwiGLU.apply(self.linear_fc1(rows_RH, ends_E), weights_TK.flatten()[order_R])
        return _Gather.apply(self.linear_fc2(hidden_RF, ends_E), order_R, place_TK)


class GroupedLinear(nn.Module):
    """One linear layer per expert, weight [E, out, in]; rows come sorted by expert."""

    def __init__(self, experts: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))

    def forward(self, rows_RI: Tensor, ends_E: Tensor) -> Tensor:
        """rows [R, in] → [R, out]; those of expert e end before row `ends_E[e]` (int32), the last end is R."""
        return F.grouped_mm(rows_RI, self.weight.transpose(1, 2), offs=ends_E)


def sort_by_expert(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which token-and-choice each row holds [R], in which row each choice stands [T, K], where each expert ends [E]."""
    sorted_R, order_R = experts_TK.flatten().sort(stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    numbers = torch.arange(experts, dtype=sorted_R.dtype, device=sorted_R.device)
    ends_E = torch.searchsorted(sorted_R, numbers, right=True, out_int32=True)
    return order_R, place_R.view_as(experts_TK), ends_E


def _rows_of_tokens(x_TH: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
    return x_TH.index_select(0, order_R // place_TK.shape[1])


def _sum_over_choices(rows_RH: Tensor, place_TK: Tensor) -> Tensor:
    return rows_RH.index_select(0, place_TK.flatten()).unflatten(0, place_TK.shape).sum(1)


class _Spread(torch.autograd.Function):
    """A copy of each token for each of its experts. Gradients are added up in a fixed order: no atomics."""

    @staticmethod
    def forward(ctx, x_TH, order_R, place_TK):
        ctx.save_for_backward(place_TK)
        return _rows_of_tokens(x_TH, order_R, place_TK)

    @staticmethod
    def backward(ctx, grad_RH):
        (place_TK,) = ctx.saved_tensors
        return _sum_over_choices(grad_RH, place_TK), None, None


class _Gather(torch.autograd.Function):
    """The sum of each token's rows: the transpose of `_Spread`."""

    @staticmethod
    def forward(ctx, rows_RH, order_R, place_TK):
        ctx.save_for_backward(order_R, place_TK)
        return _sum_over_choices(rows_RH, place_TK)

    @staticmethod
    def backward(ctx, grad_TH):
        return _rows_of_tokens(grad_TH, *ctx.saved_tensors), None, None


class _WeightedSwiGLU(torch.autograd.Function):
    """silu(gate) · up · weight [R, F] of x [R, 2F] = [gate, up] and weight [R]. Keeps only its inputs."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weight.unsqueeze(-1))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_weight = torch.linalg.vecdot((F.silu(gate) * up).to(weight.dtype), grad.to(weight.dtype))
        return swiglu_gradient(x, (grad * weight.unsqueeze(-1)).to(grad.dtype)), grad_weight
