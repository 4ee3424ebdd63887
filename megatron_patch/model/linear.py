"""Linear layers cut over the tensor-parallel axis: columns (outputs) or rows (inputs) of y = x Wᵀ.

Activations are [sequence, batch, hidden]. Under sequence parallelism the residual stream holds S/tp tokens per rank:
a column layer gathers them, a row layer scatters its sum. `multiply` is y = x Wᵀ (+ b); float8 puts its own there.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_patch.model.norm import rms_norm
from megatron_patch.parallel.collectives import (
    copy_to,
    gather_sequence,
    gather_zigzag,
    reduce_from,
    reduce_scatter_sequence,
)
from megatron_patch.parallel.mesh import Axis


def enter(x: Tensor, tp: Axis, sequence_parallel: bool) -> Tensor:
    """Residual stream → what every tensor-parallel rank needs in full."""
    return gather_sequence(x, tp) if sequence_parallel else copy_to(x, tp)


def leave(x: Tensor, tp: Axis, sequence_parallel: bool) -> Tensor:
    """Partial sums of the tensor-parallel ranks → residual stream."""
    return reduce_scatter_sequence(x, tp) if sequence_parallel else reduce_from(x, tp)


class ColumnLinear(nn.Linear):
    """Each rank computes `out_features / tp` of the outputs, and given `cp`, those of the whole sequence."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: Axis,
        sequence_parallel: bool,
        bias: bool = False,
        cp: Axis | None = None,
    ):
        super().__init__(in_features, out_features // tp.size, bias)
        self.multiply = F.linear
        self.tp, self.sequence_parallel, self.cp = tp, sequence_parallel, cp or Axis()

    def forward(self, x: Tensor) -> Tensor:
        x = gather_zigzag(enter(x, self.tp, self.sequence_parallel), self.cp)
        return self.multiply(x, self.weight, self.bias)


class LayerNormColumnLinear(ColumnLinear):
    """A column layer that first normalises its input, on the sequence shard."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        epsilon: float,
        tp: Axis,
        sequence_parallel: bool,
        bias: bool = False,
        cp: Axis | None = None,
    ):
        super().__init__(in_features, out_features, tp, sequence_parallel, bias, cp)
        self.epsilon = epsilon
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(rms_norm(x, self.layer_norm_weight, self.epsilon))


class RowLinear(nn.Linear):
    """Each rank holds `in_features / tp` of the inputs and adds its share of every output."""

    def __init__(self, in_features: int, out_features: int, tp: Axis, sequence_parallel: bool):
        super().__init__(in_features // tp.size, out_features, bias=False)
        self.multiply = F.linear
        self.tp, self.sequence_parallel = tp, sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return leave(self.multiply(x, self.weight), self.tp, self.sequence_parallel)
