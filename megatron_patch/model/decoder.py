"""The whole decoder: embedding, transformer layers, final norm, output layer."""

import torch
from torch import Tensor, nn

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.attention import SelfAttention
from megatron_patch.model.embedding import VocabParallelEmbedding, padded_vocabulary
from megatron_patch.model.linear import ColumnLinear, enter
from megatron_patch.model.loss import vocab_parallel_cross_entropy
from megatron_patch.model.mla import MLASelfAttention
from megatron_patch.model.mlp import MLP
from megatron_patch.model.moe import MoE
from megatron_patch.model.norm import RMSNorm
from megatron_patch.model.rope import rotary_tables
from megatron_patch.parallel.mesh import Axis


class TransformerLayer(nn.Module):
    """Attention and MLP or experts, each added to the residual stream.

    A norm stands here, and not in the linear layer after it, where several layers read what it normalised.
    """

    def __init__(self, config: ModelConfig, layer: int, tp: Axis, sequence_parallel: bool):
        super().__init__()
        self.input_layernorm = self.pre_mlp_layernorm = nn.Identity()
        if config.is_mla:
            self.input_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon)
            self.self_attention = MLASelfAttention(config, tp)
        else:
            self.self_attention = SelfAttention(config, tp, sequence_parallel)
        if config.is_moe_layer(layer):
            self.pre_mlp_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon)
            self.mlp = MoE(config, tp)
        else:
            self.mlp = MLP(config, tp, sequence_parallel)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x [S or S/tp, B, H] → the same shape."""
        x = x + self.self_attention(self.input_layernorm(x), rotary)
        return x + self.mlp(self.pre_mlp_layernorm(x))


class Embedding(nn.Module):
    """Only tokens are embedded; positions are rotary."""

    def __init__(self, config: ModelConfig, tp: Axis, sequence_parallel: bool):
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp, sequence_parallel)


class TransformerBlock(nn.Module):
    """The stack of layers and the norm after it."""

    def __init__(self, config: ModelConfig, tp: Axis, sequence_parallel: bool):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(config, layer, tp, sequence_parallel) for layer in range(config.num_layers)
        )
        self.final_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x [S or S/tp, B, H] → the same shape."""
        for layer in self.layers:
            x = layer(x, rotary)
        return self.final_layernorm(x)


class GPTModel(nn.Module):
    """A decoder-only language model, this tensor-parallel rank's share of it."""

    def __init__(self, config: ModelConfig, tp: Axis, sequence_parallel: bool):
        super().__init__()
        self.config, self.tp, self.sequence_parallel = config, tp, sequence_parallel
        self.embedding = Embedding(config, tp, sequence_parallel)
        self.decoder = TransformerBlock(config, tp, sequence_parallel)
        if not config.share_embeddings_and_output_weights:
            rows = padded_vocabulary(config.vocab_size, tp.size)
            self.output_layer = ColumnLinear(config.hidden_size, rows, tp, sequence_parallel)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """Loss per token [B, S], float32; without labels this rank's logits [B, S, V/tp]."""
        tokens_SB = tokens_BS.t().contiguous()
        rotary = rotary_tables(self.config, len(tokens_SB), tokens_BS.device)
        logits = self._logits(self.decoder(self.embedding.word_embeddings(tokens_SB), rotary))
        if labels_BS is None:
            return logits.transpose(0, 1)
        loss_SB = vocab_parallel_cross_entropy(logits, labels_BS.t(), self.tp, self.config.vocab_size)
        return loss_SB.t().clone()  # FSDP hooks what is returned, and a view may lose its hook

    def _logits(self, x: Tensor) -> Tensor:
        if self.config.share_embeddings_and_output_weights:
            x = enter(x, self.tp, self.sequence_parallel)
            return torch.nn.functional.linear(x, self.embedding.word_embeddings.weight)
        return self.output_layer(x)
