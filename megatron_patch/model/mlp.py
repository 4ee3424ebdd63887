"""The gated MLP (SwiGLU, arXiv:2002.05202)."""

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.linear import LayerNormColumnLinear, RowLinear
from megatron_patch.parallel.mesh import Axis


class MLP(nn.Module):
    """Norm, gate and up in one matrix ([gate_r; up_r] at rank r), down."""

    def __init__(self, config: ModelConfig, tp: Axis, sequence_parallel: bool):
        super().__init__()
        self.linear_fc1 = LayerNormColumnLinear(
            config.hidden_size, 2 * config.ffn_hidden_size, config.norm_epsilon, tp, sequence_parallel
        )
        self.linear_fc2 = RowLinear(config.ffn_hidden_size, config.hidden_size, tp, sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """x [S or S/tp, B, H] → the same shape."""
        gate, up = self.linear_fc1(x).chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate) * up)
