"""The whole decoder: embedding, transformer layers, final norm, output layer."""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.model import ModelConfig
from megatron_patch.model.activations import Keep, kept, offloaded, recomputed
from megatron_patch.model.attention import SelfAttention
from megatron_patch.model.core_attention import Packed, find_segments
from megatron_patch.model.embedding import VocabParallelEmbedding, padded_vocabulary
from megatron_patch.model.kv_cache import KVCache, LayerCache
from megatron_patch.model.linear import ColumnLinear, enter
from megatron_patch.model.loss import vocab_parallel_cross_entropy
from megatron_patch.model.mla import MLASelfAttention
from megatron_patch.model.mlp import MLP
from megatron_patch.model.moe import MoE
from megatron_patch.model.norm import RMSNorm
from megatron_patch.model.rope import rotary_tables
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.parallel.zigzag import held


class TransformerLayer(nn.Module):
    """Attention and MLP or experts, each added to the residual stream.

    A norm stands here, and not in the linear layer after it, where several layers read what it normalised.
    """

    def __init__(self, config: ModelConfig, layer: int, mesh: Mesh):
        super().__init__()
        self.input_layernorm = self.pre_mlp_layernorm = nn.Identity()
        if config.is_mla:
            self.input_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon)
            self.self_attention = MLASelfAttention(config, mesh)
        else:
            self.self_attention = SelfAttention(config, mesh)
        if config.is_moe_layer(layer):
            self.pre_mlp_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon)
            self.mlp = MoE(config, mesh)
        else:
            self.mlp = MLP(config, mesh)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        segments: Packed | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [S or S/tp, B, H] → the same shape."""
        x = x + self.self_attention(self.input_layernorm(x), rotary, segments, cache)
        return x + self.mlp(self.pre_mlp_layernorm(x))


class Embedding(nn.Module):
    """Only tokens are embedded; positions are rotary."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, mesh.tp, mesh.sequence_parallel
        )


class TransformerBlock(nn.Module):
    """The layers of one pipeline chunk, by their number in the whole model, and the norm after the last of all."""

    def __init__(self, config: ModelConfig, layers: range, mesh: Mesh, memory: MemoryConfig):
        super().__init__()
        self.memory = memory
        self.layers = nn.ModuleDict({str(layer): TransformerLayer(config, layer, mesh) for layer in layers})
        if memory.recompute_granularity == "selective":
            for layer in self.layers.values():
                layer.self_attention.core_attention.keep = recomputed
        self.is_last = layers.stop == config.num_layers
        self.final_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon) if self.is_last else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        segments: Packed | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x [S or S/tp, B, H] → the same shape; with a cache the last chunk's are each row's last token [1, B, H]."""
        if cache is not None:
            for number, layer in self.layers.items():
                x = layer(x, rotary, cache=cache.layers[number])
            return self.final_layernorm(cache.last(x) if self.is_last else x)
        layers = list(self.layers.values())
        group = self.memory.recompute_num_layers if self.memory.recompute_granularity == "full" else 1
        for first in range(0, len(layers), group):
            x = self._keep(first)(_run, layers[first : first + group], x, rotary, segments)
        return self.final_layernorm(x)

    def _keep(self, first: int) -> Keep:
        """How the layers from number `first` of this chunk keep their activations."""
        if self.memory.recompute_granularity == "full":
            return recomputed
        return offloaded if first < self.memory.cpu_offloading_num_layers else kept


def _run(layers: list[TransformerLayer], x: Tensor, *context: Any) -> Tensor:
    for layer in layers:
        x = layer(x, *context)
    return x


class GPTModel(nn.Module):
    """A decoder-only language model, or consecutive layers of it: this tensor-parallel rank's share.

    The chunk with layer 0 embeds, the one with the last layer computes the logits; a chunk between takes and gives the
    residual stream. Tied embeddings stand in both of these.
    """

    def __init__(self, config: ModelConfig, layers: range, mesh: Mesh, memory: MemoryConfig | None = None):
        super().__init__()
        self.config, self.layers, self.mesh = config, layers, mesh
        is_tied = config.share_embeddings_and_output_weights
        if self.is_first or (self.is_last and is_tied):
            self.embedding = Embedding(config, mesh)
        self.decoder = TransformerBlock(config, layers, mesh, memory or MemoryConfig())
        if self.is_last and not is_tied:
            rows = padded_vocabulary(config.vocab_size, mesh.tp.size)
            self.output_layer = ColumnLinear(config.hidden_size, rows, mesh.tp, mesh.sequence_parallel)

    @property
    def is_first(self) -> bool:
        """Whether it begins with tokens."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends with the loss, or logits."""
        return self.layers.stop == self.config.num_layers

    def forward(
        self,
        x: Tensor,
        labels_BS: Tensor | None = None,
        starts_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x: token ids [B, S], or for a later chunk the residual stream [S or S/tp, B, H]. S are the tokens that this
        context-parallel rank holds; `starts_BS` is of packed samples, as in `Batch`.

        The last chunk returns the loss per token [B, S], at least float32, or without labels this rank's logits
        [B, S, V/tp]; the others return the residual stream. With a cache the tokens follow those that it remembers, and
        the logits [B, 1, V/tp] are those of each row's last token.
        """
        if self.is_first:
            length = x.shape[1]
            x = self.embedding.word_embeddings(x.t().contiguous())
        else:
            length = len(x) * (self.mesh.tp.size if self.mesh.sequence_parallel else 1)
        positions, segments = self._places(length, x.device, starts_BS) if cache is None else (cache.positions, None)
        x = self.decoder(x, rotary_tables(self.config, positions), segments, cache)
        return self._loss(x, labels_BS) if self.is_last else x

    def _places(self, length: int, device: torch.device, starts_BS: Tensor | None) -> tuple[Tensor, Packed | None]:
        """Where each of this rank's tokens stands in its segment [S] or, packed, [S, B]; and these segments."""
        cp = self.mesh.cp
        runs = held(cp.rank, cp.size, length * cp.size)
        positions = torch.cat([torch.arange(run.start, run.stop, device=device) for run in runs])
        if starts_BS is None:
            return positions, None
        return positions[:, None] - starts_BS.t(), find_segments(starts_BS, runs)

    def _loss(self, x: Tensor, labels_BS: Tensor | None) -> Tensor:
        logits = self._logits(x)
        if labels_BS is None:
            return logits.transpose(0, 1)
        loss_SB = vocab_parallel_cross_entropy(logits, labels_BS.t(), self.mesh.tp, self.config.vocab_size)
        return loss_SB.t().clone()  # FSDP hooks what is returned, and a view may lose its hook

    def _logits(self, x: Tensor) -> Tensor:
        if self.config.share_embeddings_and_output_weights:
            x = enter(x, self.mesh.tp, self.mesh.sequence_parallel)
            return torch.nn.functional.linear(x, self.embedding.word_embeddings.weight)
        return self.output_layer(x)
