"""A mixture of experts in place of the MLP: routed without dropping a token, plus an expert that every token passes.

Shapes: S sequence, B batch, T tokens, K experts of a token, R rows of one expert each, E experts, H hidden.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.grouped import GroupedLinear, gather, sort_by_expert, spread, weighted_swiglu
from megatron_patch.model.linear import ColumnLinear, RowLinear, enter, leave
from megatron_patch.model.mlp import swiglu
from megatron_patch.model.router import TopKRouter
from megatron_patch.parallel.collectives import cut_rows, exchange, exchange_rows, join_rows
from megatron_patch.parallel.mesh import Mesh


class MoE(nn.Module):
    """Router, experts, and the shared expert where there is one.

    The router sees the residual stream of its rank. Where expert matrices are cut as the dense ones are, all tensor
    ranks compute all tokens, a slice of each expert. Where they are whole (`expert_tensor_parallel_size` 1), each
    tensor rank computes other tokens: those of its sequence slice, or a cut of the tokens that all of them hold.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        self.mesh = mesh
        self.router = TopKRouter(config, mesh)
        self.experts = Experts(config, mesh)
        self.shared_experts = SharedExperts(config, mesh) if config.moe_shared_expert_intermediate_size else None

    def forward(self, x: Tensor) -> Tensor:
        """x [S or S/tp, B, H] → the same shape."""
        weights_SBK, experts_SBK = self.router(x)
        routed = (x.flatten(0, 1), weights_SBK.flatten(0, 1), experts_SBK.flatten(0, 1))
        out = self._experts(*routed).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def _experts(self, *routed: Tensor) -> Tensor:
        tp, is_cut = self.mesh.tp, self.mesh.sequence_parallel
        if self.mesh.etp.size == tp.size:
            return leave(self.experts(*(enter(tensor, tp, is_cut) for tensor in routed)), tp, is_cut)
        if is_cut:
            return self.experts(*routed)
        return join_rows(self.experts(*(cut_rows(tensor, tp) for tensor in routed)), tp, len(routed[0]))


class SharedExperts(nn.Module):
    """A gated MLP that every token passes, weighted by a sigmoid of the token if `moe_shared_expert_gate`."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        width = config.moe_shared_expert_intermediate_size
        self.linear_fc1 = ColumnLinear(config.hidden_size, 2 * width, mesh.tp, mesh.sequence_parallel)
        self.linear_fc2 = RowLinear(width, config.hidden_size, mesh.tp, mesh.sequence_parallel)
        gate = nn.Parameter(torch.empty(1, config.hidden_size)) if config.moe_shared_expert_gate else None
        self.register_parameter("gate_weight", gate)

    def forward(self, x: Tensor) -> Tensor:
        """x [S or S/tp, B, H] → the same shape."""
        out = self.linear_fc2(swiglu(self.linear_fc1(x)))
        return out if self.gate_weight is None else out * F.linear(x, self.gate_weight).sigmoid()


class Experts(nn.Module):
    """This rank's routed experts, each matrix of theirs in one parameter: one grouped product instead of many.

    Expert-parallel ranks hold consecutive experts. A token travels to the ranks of its experts and the results back.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        self.ep, self.num_experts = mesh.ep, config.num_moe_experts
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size // mesh.etp.size
        self.linear_fc1 = GroupedLinear(self.num_experts // mesh.ep.size, hidden, 2 * width)
        self.linear_fc2 = GroupedLinear(self.num_experts // mesh.ep.size, width, hidden)

    def forward(self, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The weighted sum [T, H] of what each token's experts, of all there are, make of it.

        A partial sum where experts are cut over tensor-parallel ranks. A rank may have no token, an expert no row.
        """
        if self.ep.size == 1:
            return self._compute(x_TH, weights_TK, experts_TK)
        order_R, place_TK, ends_E = sort_by_expert(experts_TK, self.num_experts)
        sent, received, experts_R = self._deal(ends_E)
        rows_RH = exchange_rows(spread(x_TH, order_R, place_TK), self.ep, sent, received)
        weights_R = exchange_rows(weights_TK.flatten()[order_R], self.ep, sent, received)
        rows_RH = self._compute(rows_RH, weights_R.unsqueeze(1), experts_R.unsqueeze(1))
        return gather(exchange_rows(rows_RH, self.ep, received, sent), order_R, place_TK)

    def _deal(self, ends_E: Tensor) -> tuple[list[int], list[int], Tensor]:
        """Rows to each rank, rows from each, and of which local expert each row that comes will be."""
        sent_NE = ends_E.diff(prepend=ends_E.new_zeros(1)).unflatten(0, (self.ep.size, -1))
        received_NE = exchange(sent_NE, self.ep)
        sent, received = torch.stack([sent_NE.sum(1), received_NE.sum(1)]).tolist()
        numbers = torch.arange(received_NE.shape[1], device=ends_E.device).repeat(self.ep.size)
        return sent, received, numbers.repeat_interleave(received_NE.flatten(), output_size=sum(received))

    def _compute(self, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The same of this rank's experts.

        Weights are applied between the two matrices, where rows are narrower and still in order of their expert.
        """
        order_R, place_TK, ends_E = sort_by_expert(experts_TK, len(self.linear_fc1.weight))
        rows_RH = spread(x_TH, order_R, place_TK)
        hidden_RF = weighted_swiglu(self.linear_fc1(rows_RH, ends_E), weights_TK.flatten()[order_R])
        return gather(self.linear_fc2(hidden_RF, ends_E), order_R, place_TK)
