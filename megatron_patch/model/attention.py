"""Grouped-query self-attention with an optional sliding window.

Shapes: S sequence, B batch, H hidden, N query heads and G key/value heads of this rank, D head dimension, W window.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.linear import LayerNormColumnLinear, RowLinear
from megatron_patch.model.rope import rotate
from megatron_patch.parallel.mesh import Mesh


def core_attention(
    q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, window: int | None, scale: float | None = None
) -> Tensor:
    """Causal attention [B, N, S, D]; token i sees token j when 0 ≤ i − j, and i − j < `window` if there is one.

    Scores are multiplied by `scale`, 1/√D if absent.
    """
    length = q_BNSD.shape[2]
    if window is None or length <= window:
        return scaled_dot_product_attention(q_BNSD, k_BGSD, v_BGSD, is_causal=True, scale=scale, enable_gqa=True)
    return _windowed(q_BNSD, k_BGSD, v_BGSD, window, scale)


def _windowed(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, window: int, scale: float | None) -> Tensor:
    """Queries in blocks of W, each against the at most 2W − 1 keys it can see: S·W work and no S × S mask."""
    length = q_BNSD.shape[2]
    row = torch.arange(window, device=q_BNSD.device)[:, None]
    column = torch.arange(2 * window - 1, device=q_BNSD.device)[None, :]
    visible = (column >= row) & (column < row + window)  # keys begin W − 1 before the block's first query
    blocks = [core_attention(q_BNSD[:, :, :window], k_BGSD[:, :, :window], v_BGSD[:, :, :window], None, scale)]
    for start in range(window, length, window):
        stop = min(start + window, length)
        keys = slice(start - window + 1, stop)
        mask = visible[: stop - start, : stop - keys.start]
        blocks.append(
            scaled_dot_product_attention(
                q_BNSD[:, :, start:stop],
                k_BGSD[:, :, keys],
                v_BGSD[:, :, keys],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(blocks, dim=2)


class SelfAttention(nn.Module):
    """Norm, fused QKV (per query group: its query heads, its key, its value), attention, output projection."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        self.groups = config.num_query_groups // mesh.tp.size
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.head_dim, self.window = config.kv_channels, config.window_size
        self.interleaved = config.rotary_interleaved
        width = config.num_attention_heads * config.kv_channels
        self.linear_qkv = LayerNormColumnLinear(
            config.hidden_size,
            width + 2 * config.num_query_groups * config.kv_channels,
            config.norm_epsilon,
            mesh.tp,
            mesh.sequence_parallel,
            bias=config.add_qkv_bias,
        )
        self.linear_proj = RowLinear(width, config.hidden_size, mesh.tp, mesh.sequence_parallel)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x [S or S/tp, B, H] → the same shape."""
        qkv = self.linear_qkv(x)
        length, batch = qkv.shape[:2]
        grouped = qkv.view(length, batch, self.groups, self.heads_per_group + 2, self.head_dim)
        turned, v = grouped.split([self.heads_per_group + 1, 1], dim=3)
        q, k = rotate(turned, rotary, self.interleaved).split([self.heads_per_group, 1], dim=3)
        q_BNSD, k_BGSD, v_BGSD = (x.flatten(2, 3).permute(1, 2, 0, 3) for x in (q, k, v))
        out_BNSD = core_attention(q_BNSD, k_BGSD, v_BGSD, self.window)
        return self.linear_proj(out_BNSD.permute(2, 0, 1, 3).flatten(2))
