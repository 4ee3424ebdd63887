"""Rotary position embedding (arXiv:2104.09864), half-rotation convention: channel i turns with channel i + D/2."""

import torch
from torch import Tensor


def rotary_tables(length: int, dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [length, dim/2], float32: angle of position p in channel i is p · base^(-2i/dim)."""
    channels = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), base ** (-channels / dim))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x [S, B, heads, D], turned by its position on dimension 0; computed in float32, returned in x's dtype."""
    cos, sin = (table[:, None, None, :] for table in tables)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
