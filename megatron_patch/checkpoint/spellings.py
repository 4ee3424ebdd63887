"""What each legacy format calls the tensors of a rank file, and how it packs experts, derived from the manifest.

All of them are Megatron-LM's `language_model` tree; they differ in the names of norms and in what an expert MLP is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.placement import OUTPUT, as_cut
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import EMBEDDING, Entry

ENCODER = "language_model.encoder."
_FC1, _FC2, _NORM = "linear_fc1.weight", "linear_fc2.weight", "pre_mlp_layernorm.weight"


@dataclass(frozen=True)
class Packing:
    """How shards of entries become tensors: one of `parts` for each tensor, and `whole` puts a shard together again.

    Parts of several shards stand one after the other in memory. `is_wide` declares them side by side all the same.
    `moves_rows`: a part is made of whole rows of the shard.
    """

    parts: tuple[Callable[[Tensor], Tensor], ...]
    whole: Callable[[list[Tensor]], Tensor]
    is_wide: bool = False
    moves_rows: bool = True


PLAIN = Packing((lambda shard: shard,), lambda parts: parts[0])
GATE_AND_UP = Packing((lambda shard: shard.chunk(2)[0], lambda shard: shard.chunk(2)[1]), torch.cat)
# Turned in one piece: as a view it would be turned chunk by chunk, which is several times slower.
TRANSPOSED = Packing((lambda shard: shard.t().contiguous(),), lambda parts: parts[0].t().contiguous(), moves_rows=False)
TRANSPOSED_WIDE = replace(TRANSPOSED, is_wide=True)
ZEROS = Packing((torch.zeros_like,), lambda parts: parts[0])


@dataclass(frozen=True)
class Item:
    """Tensors of a rank file that are packed together: `keys`, where a dot descends, and entries as cut in this file.

    A file that is read may lack a copy of what another item holds, and zeros.
    """

    keys: tuple[str, ...]
    entries: tuple[Entry, ...]
    packing: Packing = PLAIN
    is_copy: bool = False

    @property
    def is_optional(self) -> bool:
        """Whether a file may lack it."""
        return self.is_copy or self.packing is ZEROS

    def shape(self, part_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor whose parts have `part_shape`."""
        count, (rows, *columns) = len(self.entries), part_shape
        return (rows, count * columns[0]) if self.packing.is_wide else (count * rows, *columns)

    def parts(self, tensors: list[Tensor], index: int) -> list[Tensor]:
        """The parts that `tensors`, in the order of `keys`, hold of the shard of `entries[index]`: views."""
        count = len(self.entries)
        if count == 1:
            return tensors
        rows = len(tensors[0]) if self.packing.is_wide else len(tensors[0]) // count
        return [tensor.reshape(count, rows, -1)[index] for tensor in tensors]


@dataclass(frozen=True)
class Spelling:
    """One format's names. `experts` turns the local experts of a layer, all fc1 and all fc2, into items."""

    format: str
    marker: str  # part of a key that no spelling before this one has
    layer: Mapping[str, str]
    final_norm: str
    experts: Callable[[str, Sequence[Entry], Sequence[Entry]], Iterator[Item]] | None = None
    expert_bias: str | None = None  # a parameter of each MoE layer that is zero in every model of ours
    copies_embeddings: bool = False
    needs_experts: bool = False  # nobody writes a dense model so
    expert_first: bool = False  # experts are shared by data-parallel ranks, which directories count before the stage


def items(
    spelling: Spelling, entries: Sequence[Entry], config: ModelConfig, target: Target, layers: range, ep_rank: int
) -> list[Item]:
    """The items of the files of the pipeline stage with `layers` and of one expert-parallel rank.

    Raises ValueError for an entry that the format has no place for.
    """
    local_experts = config.num_moe_experts // target.ep
    found = [*_model_wide(spelling, entries, layers.start == 0, layers.stop == config.num_layers, config)]
    experts: dict[int, list[Entry]] = {layer: [] for layer in layers}
    for entry in entries:
        if entry.layer not in experts:
            continue
        if entry.expert is None:
            found += _of_layer(spelling, entry, f"{ENCODER}layers.{entry.layer - layers.start}.")
        elif spelling.experts is None:
            raise ValueError(_no_place(spelling, entry))
        elif entry.expert // local_experts == ep_rank:
            experts[entry.layer].append(as_cut(entry, target))
    for layer, ours in experts.items():
        if ours:
            fc1, fc2 = ([entry for entry in ours if entry.mcore.endswith(end)] for end in (_FC1, _FC2))
            found += spelling.experts(f"{ENCODER}layers.{layer - layers.start}.mlp.", fc1, fc2)
    return found


def _model_wide(
    spelling: Spelling, entries: Sequence[Entry], is_first: bool, is_last: bool, config: ModelConfig
) -> Iterator[Item]:
    """Tied embeddings stand on the last stage again, where they are the output layer."""
    is_tied_far = config.share_embeddings_and_output_weights and not is_first
    for entry in entries:
        if entry.mcore == EMBEDDING:
            if is_first:
                yield Item(("language_model.embedding.word_embeddings.weight",), (entry,))
            if is_last and (spelling.copies_embeddings or is_tied_far):
                yield Item(("word_embeddings_for_head.weight",), (entry,), is_copy=True)
        elif entry.mcore == OUTPUT:
            if is_last:
                yield Item(("language_model.output_layer.weight",), (entry,))
            if is_first and spelling.copies_embeddings:
                yield Item(("lm_head.weight",), (entry,), is_copy=True)
        elif entry.layer is None and is_last:
            yield Item((f"{ENCODER}{spelling.final_norm}",), (entry,))


def _of_layer(spelling: Spelling, entry: Entry, prefix: str) -> Iterator[Item]:
    name = entry.mcore.removeprefix(f"decoder.layers.{entry.layer}.")
    if name not in spelling.layer:
        raise ValueError(_no_place(spelling, entry))
    yield Item((prefix + spelling.layer[name],), (entry,))
    if name == _NORM and spelling.expert_bias:
        yield Item((prefix + spelling.expert_bias,), (entry,), ZEROS)


def _no_place(spelling: Spelling, entry: Entry) -> str:
    return f"{spelling.format} has no place for {entry.mcore}; write this model as mcore"


def _layer_names(input_norm: str, post_attention_norm: str, router: str | None = None) -> Mapping[str, str]:
    names = {
        "self_attention.linear_qkv.layer_norm_weight": f"{input_norm}.weight",
        "self_attention.linear_qkv.weight": "self_attention.query_key_value.weight",
        "self_attention.linear_qkv.bias": "self_attention.query_key_value.bias",
        "self_attention.linear_proj.weight": "self_attention.dense.weight",
        "mlp.linear_fc1.layer_norm_weight": f"{post_attention_norm}.weight",
        "mlp.linear_fc1.weight": "mlp.dense_h_to_4h.weight",
        "mlp.linear_fc2.weight": "mlp.dense_4h_to_h.weight",
    }
    moe = {_NORM: f"{post_attention_norm}.weight", "mlp.router.weight": router} if router else {}
    return MappingProxyType(names | moe)


def _modellink_experts(prefix: str, fc1: Sequence[Entry], fc2: Sequence[Entry]) -> Iterator[Item]:
    for number, (gate_up, down) in enumerate(zip(fc1, fc2, strict=True)):
        expert = f"{prefix}block.moe_layer.experts.experts.{number}."
        yield Item((f"{expert}w1.weight", f"{expert}w3.weight"), (gate_up,), GATE_AND_UP)
        yield Item((f"{expert}w2.weight",), (down,))


def _mixtral_train_experts(prefix: str, fc1: Sequence[Entry], fc2: Sequence[Entry]) -> Iterator[Item]:
    """Declared [H, E * 2F] and [E * F, H]; in memory [E, H, 2F] and [E, F, H]."""
    yield Item((f"{prefix}experts.weight1",), tuple(fc1), TRANSPOSED_WIDE)
    yield Item((f"{prefix}experts.weight2",), tuple(fc2), TRANSPOSED)


def _megablocks_experts(prefix: str, fc1: Sequence[Entry], fc2: Sequence[Entry]) -> Iterator[Item]:
    """All [E * F, H]. MegaBlocks computes act(x @ w1.T) * (x @ v1.T): w1 is the gate (its layers/glu.py)."""
    yield Item((f"{prefix}moe.experts.mlp.w1", f"{prefix}moe.experts.mlp.v1"), tuple(fc1), GATE_AND_UP)
    yield Item((f"{prefix}moe.experts.mlp.w2",), tuple(fc2), TRANSPOSED)


SPELLINGS = (
    Spelling(
        "megatron",
        ".input_layernorm.",
        _layer_names("input_layernorm", "post_attention_layernorm"),
        "final_layernorm.weight",
        copies_embeddings=True,
    ),
    Spelling(
        "mixtral_train",
        ".mlp.experts.weight1",
        _layer_names("input_norm", "post_attention_norm", "mlp.router.weight"),
        "final_norm.weight",
        _mixtral_train_experts,
        needs_experts=True,
    ),
    Spelling(
        "megablocks",
        ".mlp.moe.experts.",
        _layer_names("input_norm", "post_attention_norm", "mlp.moe.router.layer.weight"),
        "final_norm.weight",
        _megablocks_experts,
        expert_bias="mlp.moe.experts.bias",
        needs_experts=True,
        expert_first=True,
    ),
    Spelling(
        "modellink",
        ".input_norm.",
        _layer_names("input_norm", "post_attention_norm", "mlp.block.moe_layer.gate.weight.weight"),
        "final_norm.weight",
        _modellink_experts,
    ),
)
