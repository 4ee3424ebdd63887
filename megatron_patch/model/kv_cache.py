"""What layers remember of the tokens that they have seen, so that a new token is computed alone.

Shapes: B rows, each a sequence of its own length, L tokens of a pass, G key/value heads of this rank with R query heads
each, D channels, S slots of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_patch.model.core_attention import CoreAttention


class KVCache:
    """The memory of consecutive layers for the rows of a batch: a slot per token, or with a window a ring of its size.

    The first pass is of whole prompts [B, longest], padded on the right; after it each `advance` makes room for one
    token more in every row. `lengths` counts what each row has, the token under way included.
    """

    def __init__(
        self, layers: range, lengths: Sequence[int], limit: int, window: int | None, device: torch.device
    ) -> None:
        self.lengths, self.device = list(lengths), device
        self.slots = min(limit, window or limit)  # tokens of a row that are remembered
        self.is_prompt = True
        self.layers = {str(layer): LayerCache(self) for layer in layers}
        self.positions = torch.arange(max(lengths), device=device)
        self.slot_B: Tensor | None = None
        self.mask: Tensor | None = None

    def advance(self) -> None:
        """One token more in every row: where it stands, its slot, and which slots each row sees."""
        self.is_prompt = False
        self.lengths = [length + 1 for length in self.lengths]
        lengths_B = torch.tensor(self.lengths, device=self.device)
        self.positions = (lengths_B - 1).unsqueeze(0)
        self.slot_B = (lengths_B - 1) % self.slots
        seen = {min(length, self.slots) for length in self.lengths}
        slots_S = torch.arange(max(seen), device=self.device)
        self.mask = (slots_S < lengths_B[:, None])[:, None, None] if len(seen) > 1 else None

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was: rows are left out, reordered, doubled."""
        if list(rows) == list(range(len(self.lengths))):
            return
        self.lengths = [self.lengths[row] for row in rows]
        index = torch.tensor(rows, device=self.device)
        for layer in self.layers.values():
            layer.stored = [tensor.index_select(0, index) for tensor in layer.stored]

    def last(self, x_LBH: Tensor) -> Tensor:
        """Of a pass's tokens the last of each row [1, B, H]: what the next token follows from."""
        if not self.is_prompt:
            return x_LBH
        last_B = torch.tensor(self.lengths, device=x_LBH.device) - 1
        return x_LBH[last_B, torch.arange(len(last_B), device=x_LBH.device)].unsqueeze(0)


class LayerCache:
    """The memory of one layer: tensors [B, G, S, D], keys and values or whatever the layer stores."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.stored: list[Tensor] = []

    @property
    def is_prompt(self) -> bool:
        """Whether this pass is of whole prompts, which see nothing from before."""
        return self.cache.is_prompt

    def attend(self, core: CoreAttention, q_BNLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor) -> Tensor:
        """`core`'s attention [B, N, L, D] to all tokens of each row, the new keys and values remembered."""
        if self.is_prompt:
            self.store(k_BGLD, v_BGLD)
            return core(q_BNLD, k_BGLD, v_BGLD)
        k_BGSD, v_BGSD = self.append(k_BGLD, v_BGLD)
        return self.attend_to(q_BNLD, k_BGSD, v_BGSD, core.scale)

    def attend_to(self, q_BN1D: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float | None) -> Tensor:
        """Attention [B, N, 1, D] of each row's new token: a group's query heads are so many queries of its key head."""
        q_BGRD = q_BN1D.unflatten(1, (k_BGSD.shape[1], -1)).squeeze(3)
        out_BGRD = scaled_dot_product_attention(q_BGRD, k_BGSD, v_BGSD, attn_mask=self.cache.mask, scale=scale)
        return out_BGRD.flatten(1, 2).unsqueeze(2)

    def store(self, *prompts_BGLD: Tensor) -> None:
        """Remember whole prompts, or of a longer one what the ring holds."""
        self.stored = [self._placed(tensor) for tensor in prompts_BGLD]

    def append(self, *tokens_BG1D: Tensor) -> list[Tensor]:
        """Remember one token of each row; returns all that is remembered, up to the longest row's last slot."""
        rows = torch.arange(len(self.cache.lengths), device=self.cache.device)
        for tensor, token in zip(self.stored, tokens_BG1D, strict=True):
            tensor[rows, :, self.cache.slot_B] = token.squeeze(2)
        seen = min(max(self.cache.lengths), self.cache.slots)
        return [tensor[:, :, :seen] for tensor in self.stored]

    def _placed(self, prompts_BGLD: Tensor) -> Tensor:
        batch, groups, longest, width = prompts_BGLD.shape
        slots = self.cache.slots
        if longest <= slots:
            stored = prompts_BGLD.new_zeros(batch, groups, slots, width)
            stored[:, :, :longest] = prompts_BGLD
            return stored
        slots_S = torch.arange(slots, device=prompts_BGLD.device)
        last_B = torch.tensor(self.cache.lengths, device=prompts_BGLD.device) - 1
        rounds_BS = (last_B[:, None] - slots_S).div(slots, rounding_mode="floor").clamp(min=0)
        latest_BS = slots_S + rounds_BS * slots  # the last token of the row that belongs in the slot
        return prompts_BGLD.gather(2, latest_BS[:, None, :, None].expand(-1, groups, -1, width))
