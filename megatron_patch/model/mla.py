"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are expanded from a small shared latent.

Tensor-parallel ranks cut the heads; each holds the down projections whole and runs them on its own tokens.
Context-parallel ranks gather the latent and the shared rotated channels, a fraction of what the keys and values of all
heads would be, and each expands them.

Shapes: S sequence, of which this context-parallel rank holds L tokens, B batch, H hidden, N heads of this rank; a query
and a key head hold C channels without position and then P rotated ones, a value head V channels; the latent holds K.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.core_attention import CoreAttention, Packed
from megatron_patch.model.kv_cache import LayerCache
from megatron_patch.model.linear import ColumnLinear, LayerNormColumnLinear, RowLinear, enter
from megatron_patch.model.norm import rms_norm
from megatron_patch.model.rope import rotate, softmax_temperature
from megatron_patch.parallel.collectives import gather_zigzag
from megatron_patch.parallel.mesh import Mesh


class MLASelfAttention(nn.Module):
    """Queries, compressed or not; keys and values through one latent; rotated key channels that all heads share."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        self.tp, self.cp, self.sequence_parallel = mesh.tp, mesh.cp, mesh.sequence_parallel
        cut = {"tp": mesh.tp, "sequence_parallel": mesh.sequence_parallel}
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.plain, self.turned, self.value = config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
        self.latent, self.interleaved = config.kv_lora_rank, config.rotary_interleaved
        scale = softmax_temperature(config) / (self.plain + self.turned) ** 0.5
        self.core_attention = CoreAttention(config.window_size, mesh.cp, scale)
        query = heads * (self.plain + self.turned)
        if config.q_lora_rank is None:
            self.linear_q_proj = ColumnLinear(hidden, query, **cut)
        else:
            self.linear_q_down_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.linear_q_up_proj = LayerNormColumnLinear(config.q_lora_rank, query, config.norm_epsilon, **cut)
        self.is_query_compressed = config.q_lora_rank is not None
        self.linear_kv_down_proj = nn.Linear(hidden, self.latent + self.turned, bias=False)
        self.linear_kv_up_proj = LayerNormColumnLinear(
            self.latent, heads * (self.plain + self.value), config.norm_epsilon, **cut, cp=mesh.cp
        )
        self.linear_proj = RowLinear(heads * self.value, hidden, **cut)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        packed: Packed | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [L or L/tp, B, H], normalised → the same shape."""
        q = self.linear_q_up_proj(self.linear_q_down_proj(x)) if self.is_query_compressed else self.linear_q_proj(x)
        q_LBND = rotate(q.unflatten(-1, (-1, self.plain + self.turned)), rotary, self.interleaved)
        compressed = self.linear_kv_down_proj(x)
        if cache is not None:
            remembered_B1LK = self._remembered(compressed, rotary)
            if not cache.is_prompt:
                return self.linear_proj(self._attend_to_latents(q_LBND, remembered_B1LK, cache))
            cache.store(remembered_B1LK)
        q_BNLD = q_LBND.permute(1, 2, 0, 3).contiguous()  # kernels read a head's tokens one after the other
        out_BNLV = self.core_attention(q_BNLD, *self._expand(compressed, rotary), packed)[..., : self.value]
        return self.linear_proj(out_BNLV.permute(2, 0, 1, 3).flatten(2))

    def _expand(self, compressed: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys [B, N, S, C + P] and values [B, N, S, at least C + P] of all heads.

        Values get channels of zeros: fused attention wants heads of one width, and the plain one holds S × S scores.
        """
        latent, shared = compressed.split([self.latent, self.turned], dim=-1)
        kv_SBND = self.linear_kv_up_proj(latent).unflatten(-1, (-1, self.plain + self.value))
        k_BNSC, v_BNSV = kv_SBND.permute(1, 2, 0, 3).split([self.plain, self.value], dim=-1)
        k_LBP = rotate(enter(shared, self.tp, self.sequence_parallel), rotary, self.interleaved)
        k_B1SP = gather_zigzag(k_LBP, self.cp).transpose(0, 1).unsqueeze(1)
        k_BNSD = torch.cat([k_BNSC, k_B1SP.expand(-1, k_BNSC.shape[1], -1, -1)], dim=-1)
        return k_BNSD, F.pad(v_BNSV, (0, max(self.plain + self.turned - self.value, 0)))

    def _remembered(self, compressed: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """What a cache keeps of each token [B, 1, L, K + P]: the normalised latent, the rotated channels."""
        latent, shared = compressed.split([self.latent, self.turned], dim=-1)
        latent = rms_norm(latent, self.linear_kv_up_proj.layer_norm_weight, self.linear_kv_up_proj.epsilon)
        return torch.cat([latent, rotate(shared, rotary, self.interleaved)], dim=-1).transpose(0, 1).unsqueeze(1)

    def _attend_to_latents(self, q_LBND: Tensor, remembered_B1LK: Tensor, cache: LayerCache) -> Tensor:
        """Attention [L, B, N·V] of a new token to all before it, whose keys and values are not expanded.

        A score q · (W k) is (Wᵀ q) · k, and a sum of expanded values the expanded sum of latents: all heads attend to
        the latents as to the one key head and, without the rotated channels, value head of grouped-query attention.
        """
        up_NDK = self.linear_kv_up_proj.weight.unflatten(0, (-1, self.plain + self.value))
        to_key_NCK, to_value_NVK = up_NDK.split([self.plain, self.value], dim=1)
        plain_LBNC, turned_LBNP = q_LBND.split([self.plain, self.turned], dim=-1)
        q_LBNK = torch.cat([torch.einsum("lbnc,nck->lbnk", plain_LBNC, to_key_NCK), turned_LBNP], dim=-1)
        (latents_B1SK,) = cache.append(remembered_B1LK)
        values = latents_B1SK[..., : self.latent]
        out_BNLK = cache.attend_to(q_LBNK.permute(1, 2, 0, 3), latents_B1SK, values, self.core_attention.scale)
        return torch.einsum("bnlk,nvk->lbnv", out_BNLK, to_value_NVK).flatten(2)
