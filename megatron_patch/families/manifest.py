"""Every parameter of a model, by its mcore name and its Hugging Face names."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_patch.config.model import ModelConfig
from megatron_patch.families.family import Family

# Buffers that old checkpoints stored and no model needs.
IGNORED_HF = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Entry:
    """One parameter: `mcore` carries the global layer index, `shape` is full and without vocabulary padding."""

    mcore: str
    hf: tuple[str, ...]
    layout: str
    shard: str | None
    shape: tuple[int, ...]
    layer: int | None


def manifest(family: Family, config: ModelConfig) -> list[Entry]:
    """One entry per parameter of `config`, model-wide ones first, then layer by layer."""
    rules = family.rules(config)
    everywhere = [rule for rule in rules if "{l}" not in rule.mcore]
    per_layer = [rule for rule in rules if "{l}" in rule.mcore]
    places = [(rule, None) for rule in everywhere]
    places += [(rule, layer) for layer in range(config.num_layers) for rule in per_layer]
    return [
        Entry(
            mcore=rule.mcore.format(l=layer),
            hf=tuple(name.format(l=layer) for name in rule.hf),
            layout=rule.layout,
            shard=rule.shard,
            shape=rule.shape(config),
            layer=layer,
        )
        for rule, layer in places
    ]


def parameter_count(family: Family, config: ModelConfig) -> int:
    """Exact number of parameters, vocabulary padding not counted."""
    return sum(math.prod(entry.shape) for entry in manifest(family, config))


def check_complete(wanted: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raise ValueError unless `found` names every wanted tensor once and nothing else."""
    expected = Counter(wanted)
    twice = sorted(name for name, count in expected.items() if count > 1)
    if twice:
        raise AssertionError(f"two rules claim the same tensor: {_some(twice)}")
    present = {name for name in found if not IGNORED_HF.search(name)}
    missing, unused = sorted(expected.keys() - present), sorted(present - expected.keys())
    if missing or unused:
        parts = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
        parts += [f"{len(unused)} unknown ({_some(unused)})"] if unused else []
        raise ValueError(f"{where} does not hold exactly this model's tensors: {'; '.join(parts)}")


def _some(names: list[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
