"""Which rank file of a classic Megatron checkpoint holds which tensor, and under which name: arithmetic on a Target.

A rank file holds the layers of its pipeline stage, counted from 0 in each virtual chunk, and its share of the experts,
counted from 0 too. What is not an expert stands in the files of every expert-parallel rank.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megatron_patch.checkpoint.interface import Target
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import EMBEDDING, Entry
from megatron_patch.parallel.stages import layer_ranges, stage_layers

OUTPUT = "output_layer.weight"
_LAYERS, _EXPERTS = "decoder.layers.", "mlp.experts.local_experts."
# Behind the layer: Transformer Engine fuses a norm into the linear that follows it, Megatron-Core alone does not.
_LOCAL_SPELLINGS = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
    ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"),
)
# Pai-Megatron-Patch wrote these before Megatron-Core had latent attention and shared experts of its own.
_FORMER_SPELLINGS = MappingProxyType(
    {
        "self_attention.linear_q_a_proj.weight": "self_attention.linear_q_down_proj.weight",
        "self_attention.q_a_layernorm.weight": "self_attention.q_layernorm.weight",
        "self_attention.linear_q_b_proj.weight": "self_attention.linear_q_up_proj.weight",
        "self_attention.linear_kv_a_proj_with_mqa.weight": "self_attention.linear_kv_down_proj.weight",
        "self_attention.kv_a_layernorm.weight": "self_attention.kv_layernorm.weight",
        "self_attention.linear_kv_b_proj.weight": "self_attention.linear_kv_up_proj.weight",
        "mlp.shared_expert.linear_fc1.weight": "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_expert.linear_fc2.weight": "mlp.shared_experts.linear_fc2.weight",
        "mlp.shared_expert_gate.weight": "mlp.shared_experts.gate_weight",
    }
)
# Transformer Engine replicates the down projections of latent attention, Megatron-Core alone cuts their rows.
_DOWN_PROJECTIONS = ("self_attention.linear_q_down_proj.weight", "self_attention.linear_kv_down_proj.weight")


Rank = tuple[int, int, int]  # tensor-parallel rank, pipeline stage, expert-parallel rank


@dataclass(frozen=True)
class Slot:
    """One tensor of a rank file: `key` in the dict of virtual chunk `chunk` holds `entry`."""

    entry: Entry
    chunk: int
    key: str


def check_layout(config: ModelConfig, target: Target) -> None:
    """Raise ValueError, in one sentence, for sizes into which Megatron cannot divide the model."""
    heads = config.num_attention_heads if config.is_mla else config.num_query_groups
    if heads % target.tp:
        kind = "attention heads" if config.is_mla else "query groups"
        raise ValueError(f"tp {target.tp} does not divide the {heads} {kind}; choose a divisor")
    if target.expert_tp not in (1, target.tp):
        raise ValueError(f"etp is {target.expert_tp}; experts are cut as the rest is, by tp {target.tp}, or not, by 1")
    if target.ep > 1 and not config.num_moe_experts:
        raise ValueError(f"ep is {target.ep}, but the model has no experts; leave it at 1")
    if config.num_moe_experts % target.ep:
        raise ValueError(f"ep {target.ep} does not divide {config.num_moe_experts} experts; choose a divisor")
    stage_ranges(config.num_layers, target)


def stage_ranges(num_layers: int, target: Target) -> list[list[range]]:
    """Global layers by pipeline stage and virtual chunk. Raises ValueError where they cannot be shared."""
    counts = stage_layers(num_layers, pp=target.pp, vp=target.vp, first_stage_layers=target.first_stage_layers)
    return layer_ranges(counts)


def file_slots(
    entries: Sequence[Entry], config: ModelConfig, target: Target, ranges: list[list[range]], stage: int, ep_rank: int
) -> Iterator[Slot]:
    """The tensors of the files of one stage and expert-parallel rank, the same for every tensor-parallel rank.

    With tied embeddings and several stages the last one holds the embedding again, as its output layer.
    """
    last = stage == len(ranges) - 1
    place = {layer: (chunk, i) for chunk, layers in enumerate(ranges[stage]) for i, layer in enumerate(layers)}
    local_experts = config.num_moe_experts // target.ep
    for entry in entries:
        if entry.layer is None:
            is_embedding = entry.mcore == EMBEDDING
            if stage == 0 if is_embedding else last:
                yield Slot(entry, 0 if is_embedding else len(ranges[stage]) - 1, entry.mcore)
            if is_embedding and last and stage > 0 and config.share_embeddings_and_output_weights:
                yield Slot(entry, len(ranges[stage]) - 1, OUTPUT)
        elif entry.layer in place and (entry.expert is None or entry.expert // local_experts == ep_rank):
            chunk, index = place[entry.layer]
            key = file_key(entry, index, local_experts, target.transformer_impl, target.experts)
            yield Slot(entry, chunk, key)


def file_key(entry: Entry, index: int, local_experts: int, transformer_impl: str, experts: str) -> str:
    """The name of a layer's `entry` in a chunk where that layer is number `index`."""
    name = entry.mcore.removeprefix(f"{_LAYERS}{entry.layer}.")
    if entry.expert is not None:
        expert, linear = entry.expert % local_experts, name.removeprefix(f"{_EXPERTS}{entry.expert}.")
        name = f"mlp.experts.{linear}{expert}" if experts == "grouped" else f"{_EXPERTS}{expert}.{linear}"
    elif transformer_impl == "local":
        name = dict(_LOCAL_SPELLINGS).get(name, name)
    return f"{_LAYERS}{index}.{name}"


def current_key(key: str) -> str:
    """`key` as Megatron-Core spells it today."""
    name = _behind_layer(key)
    return key.removesuffix(name) + _FORMER_SPELLINGS.get(name, name)


def spelling_of(keys: Iterable[str], entries: Iterable[Entry]) -> str:
    """Whose names the `keys` of rank files are: te or local."""
    own = {_behind_layer(entry.mcore) for entry in entries if entry.layer is not None}
    local = {local for te, local in _LOCAL_SPELLINGS if te in own and local not in own}
    return "local" if any(_behind_layer(key) in local for key in keys) else "te"


def _behind_layer(name: str) -> str:
    return name.removeprefix(_LAYERS).partition(".")[2]


def as_cut(entry: Entry, target: Target) -> Entry:
    """`entry` with the shard that its tensors have on `target`'s tensor-parallel ranks."""
    if target.transformer_impl == "local" and entry.mcore.endswith(_DOWN_PROJECTIONS):
        return dataclasses.replace(entry, shard="column")
    if entry.expert is not None and target.expert_tp == 1:
        return dataclasses.replace(entry, shard=None)
    return entry


def padded_vocabulary(config: ModelConfig, tp: int) -> int:
    """Rows of the embedding, so that every tensor-parallel rank has as many."""
    return -(-config.vocab_size // tp) * tp


def rank_name(target: Target, tp_rank: int, stage: int, ep_rank: int) -> str:
    """The directory of a rank. With one of pp and ep above 1, the name does not tell which one it counts."""
    name = f"mp_rank_{tp_rank:02d}"
    name += f"_{stage:03d}" if target.pp > 1 else ""
    return name + (f"_{ep_rank:03d}" if target.ep > 1 else "")


def ranks(target: Target) -> Iterator[Rank]:
    """Every rank that has a file."""
    return itertools.product(range(target.tp), range(target.pp), range(target.ep))
