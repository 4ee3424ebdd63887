"""Rotary position embedding (arXiv:2104.09864), and how its frequencies are stretched to longer contexts."""

import math

import torch
from torch import Tensor

from megatron_patch.config.model import ModelConfig


def rotary_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin of `positions` [S] or [S, B] → [S(, B), D/2], float32, D the rotated channels of a head; both carry
    yarn's temperature."""
    angles = positions.float().unsqueeze(-1) * inverse_frequencies(config, positions.device)
    temperature = _temperature(config)
    return angles.cos() * temperature, angles.sin() * temperature


def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per token of each channel pair [D/2], float32: base^(-2i/D), scaled as `rope_type` says."""
    dim = config.qk_pos_emb_head_dim if config.is_mla else config.kv_channels
    channels = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / config.rotary_base ** (channels / dim)
    if config.rope_type == "default":
        return plain
    kept = _kept_llama3(config, plain) if config.rope_type == "llama3" else _kept_yarn(config, plain, dim)
    return plain / config.rotary_scaling_factor * (1 - kept) + plain * kept


def softmax_temperature(config: ModelConfig) -> float:
    """What yarn multiplies the attention scores of multi-head latent attention by (DeepSeek-V2's reading of it)."""
    if config.rope_type != "yarn":
        return 1.0
    return yarn_mscale(config.rotary_scaling_factor, config.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """Growth of the attention's temperature with the stretched context (arXiv:2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _temperature(config: ModelConfig) -> float:
    """Factor of cos and sin: all of yarn's temperature, or what `softmax_temperature` leaves of it."""
    if config.rope_type != "yarn":
        return 1.0
    factor = config.rotary_scaling_factor
    if config.mscale and config.mscale_all_dim:
        return yarn_mscale(factor, config.mscale) / yarn_mscale(factor, config.mscale_all_dim)
    return yarn_mscale(factor, 1.0)


def _kept_llama3(config: ModelConfig, plain: Tensor) -> Tensor:
    """Share of each frequency that is not scaled: linear in the turns made over the original context."""
    turns = config.original_max_position_embeddings * plain / (2 * math.pi)
    return ((turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0, 1)


def _kept_yarn(config: ModelConfig, plain: Tensor, dim: int) -> Tensor:
    """Share of each frequency that is not scaled: falls from the pair that turns beta_fast times to beta_slow."""

    def channel(turns: float) -> float:
        wavelength = config.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.rotary_base))

    low = max(math.floor(channel(config.beta_fast)), 0)
    high = min(math.ceil(channel(config.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    pair = torch.arange(len(plain), dtype=torch.float32, device=plain.device)
    return 1 - ((pair - low) / width).clamp(0, 1)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """x [S, B, …, C + D]: the last D channels turned as `tables` [S(, B), D/2] say, the first C as they were.

    Channel i turns with i + D/2 or, `interleaved`, 2i with 2i + 1. Computed in at least float32, returned in x's dtype.
    """
    cos, sin = (table.view(*table.shape[:-1], *[1] * (x.ndim - table.ndim), -1) for table in tables)
    return _Rotate.apply(x, cos, sin, interleaved)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing of x needs to be kept."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.interleaved), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    still = x.shape[-1] - 2 * cos.shape[-1]
    out = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    first, second = _pairs(x[..., still:], interleaved)
    out_first, out_second = _pairs(out[..., still:], interleaved)
    out_first.mul_(cos).addcmul_(second, sin, value=-1)
    out_second.mul_(cos).addcmul_(first, sin)
    return out.to(x.dtype)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
