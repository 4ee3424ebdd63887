"""Every parameter of a model, by its mcore name and its Hugging Face names."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_patch.config.model import ModelConfig
from megatron_patch.families.family import Family, Rule

EMBEDDING = "embedding.word_embeddings.weight"
MOST_ENTRIES = 1 << 18  # of one model; published ones have up to a quarter of it
# Buffers that old checkpoints stored and no model needs.
IGNORED_HF = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Entry:
    """One parameter, by global layer and routed expert; `shape` is full and without vocabulary padding."""

    mcore: str
    hf: tuple[str, ...]
    layout: str
    shard: str | None
    shape: tuple[int, ...]
    layer: int | None
    expert: int | None = None


def manifest(family: Family, config: ModelConfig) -> list[Entry]:
    """One entry per parameter of `config`, model-wide ones first, then layer by layer, experts in order.

    Raises ValueError for an architecture of more than MOST_ENTRIES: no such model fits anywhere.
    """
    return [entry for rule, layer in _placed(family, config) for entry in _entries(rule, config, layer)]


def _placed(family: Family, config: ModelConfig) -> Iterator[tuple[Rule, int | None]]:
    """Every rule of the model as a whole, then of each layer. Raises as `manifest`."""
    rules = family.rules(config)
    yield from ((rule, None) for rule in rules if "{l}" not in rule.mcore)
    per_layer = [rule for rule in rules if "{l}" in rule.mcore]
    most = config.num_layers * sum(config.num_moe_experts if "{e}" in rule.mcore else 1 for rule in per_layer)
    if most > MOST_ENTRIES:
        experts = f" and num_moe_experts {config.num_moe_experts}" if config.num_moe_experts else ""
        total = f"up to {most:,} tensors; at most {MOST_ENTRIES:,} are supported"
        raise ValueError(f"num_layers {config.num_layers}{experts} make {total}")
    for layer in range(config.num_layers):
        kinds = ("all", "moe" if config.is_moe_layer(layer) else "dense")
        yield from ((rule, layer) for rule in per_layer if rule.layers in kinds)


def _entries(rule: Rule, config: ModelConfig, layer: int | None) -> Iterator[Entry]:
    """What `rule` is in `layer`: one entry, or one per routed expert."""
    shape = rule.shape(config)
    for expert in range(config.num_moe_experts) if "{e}" in rule.mcore else (None,):
        yield Entry(
            mcore=rule.mcore.format(l=layer, e=expert),
            hf=tuple(name.format(l=layer, e=expert) for name in rule.hf),
            layout=rule.layout,
            shard=rule.shard,
            shape=shape,
            layer=layer,
            expert=expert,
        )


def parameter_count(family: Family, config: ModelConfig) -> int:
    """Exact number of parameters, vocabulary padding not counted."""
    return _elements(family, config, config.num_moe_experts)


def active_parameter_count(family: Family, config: ModelConfig) -> int:
    """Exact number of parameters that one token passes through."""
    return _elements(family, config, min(config.moe_router_topk, config.num_moe_experts))


def _elements(family: Family, config: ModelConfig, experts: int) -> int:
    placed = _placed(family, config)
    return sum(math.prod(rule.shape(config)) * (experts if "{e}" in rule.mcore else 1) for rule, _ in placed)


def check_complete(wanted: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raise ValueError unless `found` names every wanted tensor once and nothing else."""
    expected = Counter(wanted)
    twice = sorted(name for name, count in expected.items() if count > 1)
    if twice:
        raise AssertionError(f"two rules claim the same tensor: {listed(twice)}")
    present = {name for name in found if not IGNORED_HF.search(name)}
    missing, unused = sorted(expected.keys() - present), sorted(present - expected.keys())
    if missing or unused:
        parts = [f"{len(missing)} missing ({listed(missing)})"] if missing else []
        parts += [f"{len(unused)} unknown ({listed(unused)})"] if unused else []
        raise ValueError(f"{where} does not hold exactly this model's tensors: {'; '.join(parts)}")


def listed(names: Sequence[str], shown: int = 4) -> str:
    """The first of `names`, and how many more there are."""
    more = len(names) - shown
    legible = (name if name.isprintable() else repr(name) for name in names[:shown])
    return ", ".join(legible) + (f" and {more:,} more" if more > 0 else "")
