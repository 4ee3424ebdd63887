"""Grouped-query self-attention.

Shapes: S sequence, of which this context-parallel rank holds L tokens, B batch, H hidden, N query heads and G key/value
heads of this rank, D head dimension.
"""

import torch
from torch import Tensor, nn

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.core_attention import CoreAttention, Packed
from megatron_patch.model.kv_cache import LayerCache
from megatron_patch.model.linear import LayerNormColumnLinear, RowLinear
from megatron_patch.model.rope import rotate
from megatron_patch.parallel.collectives import gather_zigzag
from megatron_patch.parallel.mesh import Mesh


class SelfAttention(nn.Module):
    """Norm, fused QKV (per query group: its query heads, its key, its value), attention, output projection."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        self.groups = config.num_query_groups // mesh.tp.size
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.head_dim, self.interleaved, self.cp = config.kv_channels, config.rotary_interleaved, mesh.cp
        self.core_attention = CoreAttention(config.window_size, mesh.cp)
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

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        packed: Packed | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [L or L/tp, B, H] → the same shape."""
        qkv = self.linear_qkv(x)
        length, batch = qkv.shape[:2]
        grouped = qkv.view(length, batch, self.groups, self.heads_per_group + 2, self.head_dim)
        turned, v = grouped.split([self.heads_per_group + 1, 1], dim=3)
        q, k = rotate(turned, rotary, self.interleaved).split([self.heads_per_group, 1], dim=3)
        if self.cp.size > 1:
            k, v = gather_zigzag(torch.cat([k, v], dim=3), self.cp).split(1, dim=3)
        # Kernels read a head's tokens one after the other; and what is copied lets go of the rest of `qkv`.
        q_BNLD, k_BGSD, v_BGSD = (x.permute(1, 2, 3, 0, 4).flatten(1, 2).contiguous() for x in (q, k, v))
        if cache is None:
            out_BNLD = self.core_attention(q_BNLD, k_BGSD, v_BGSD, packed)
        else:
            out_BNLD = cache.attend(self.core_attention, q_BNLD, k_BGSD, v_BGSD)
        return self.linear_proj(out_BNLD.permute(2, 0, 1, 3).flatten(2))
