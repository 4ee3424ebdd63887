"""The token embedding, its rows cut over the tensor-parallel axis."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_patch.model.linear import leave
from megatron_patch.parallel.mesh import Axis


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Rows of the embedding once each of `tp` ranks holds the same number."""
    return -(-vocab_size // tp) * tp


class VocabParallelEmbedding(nn.Module):
    """Each rank looks up its own rows and adds zeros for the others'."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: Axis, sequence_parallel: bool):
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        self.rows = padded_vocabulary(vocab_size, tp.size) // tp.size
        self.weight = nn.Parameter(torch.empty(self.rows, hidden_size))

    def forward(self, tokens_SB: Tensor) -> Tensor:
        """Token ids [S, B] → [S or S/tp, B, H]."""
        if self.tp.size == 1:
            return F.embedding(tokens_SB, self.weight)
        local = tokens_SB - self.tp.rank * self.rows
        elsewhere = (local < 0) | (local >= self.rows)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return leave(rows.masked_fill(elsewhere[..., None], 0), self.tp, self.sequence_parallel)
