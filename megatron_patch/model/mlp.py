"""The gated MLP (SwiGLU, arXiv:2002.05202)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.linear import LayerNormColumnLinear, RowLinear
from megatron_patch.parallel.mesh import Mesh


class MLP(nn.Module):
    """Norm, gate and up in one matrix ([gate_r; up_r] at rank r), down."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        self.linear_fc1 = LayerNormColumnLinear(
            config.hidden_size, 2 * config.ffn_hidden_size, config.norm_epsilon, mesh.tp, mesh.sequence_parallel
        )
        self.linear_fc2 = RowLinear(config.ffn_hidden_size, config.hidden_size, mesh.tp, mesh.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """x [S or S/tp, B, H] → the same shape."""
        return self.linear_fc2(swiglu(self.linear_fc1(x)))


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2F] = [gate, up] → silu(gate) · up [..., F]."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Keeps only x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        return swiglu_gradient(*ctx.saved_tensors, grad)


def swiglu_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient [..., 2F] of x, given that [..., F] of silu(gate) · up."""
    gate, up = x.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([grad_gate, F.silu(gate).mul_(grad)], dim=-1)
