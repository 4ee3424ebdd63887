"""Rotary position embedding (arXiv:2104.09864), half-rotation convention: channel i turns with channel i + D/2."""

import torch
from torch import Tensor


def rotary_tables(length: int, dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [length, dim/2], float32: angle of position p in channel i is p · base^(-2i/dim)."""
    channels = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), base ** (-channels / dim))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x [S, …, D], turned by its position on dimension 0; computed in at least float32, returned in x's dtype."""
    cos, sin = (table.view(len(table), *[1] * (x.ndim - 2), -1) for table in tables)
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing of x needs to be kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.to(x.dtype)
