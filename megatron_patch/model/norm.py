"""Root-mean-square normalisation (arXiv:1910.07467)."""

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., H] scaled to unit root mean square in at least float32, rounded to x's dtype, times weight [H]."""
    return _RMSNorm.apply(x, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    """The gradient in closed form: it keeps x and one number per token, where autograd would keep three copies of x."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = torch.rsqrt(scale.square_() / x.shape[-1] + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        grad_unit = grad.to(scale.dtype) * weight
        share = torch.linalg.vecdot(grad_unit, unit).unsqueeze(-1) / x.shape[-1]
        grad_x = torch.addcmul(grad_unit, unit, share, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """A norm that stands alone; most are the first half of a `LayerNormColumnLinear`."""

    def __init__(self, hidden_size: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)
