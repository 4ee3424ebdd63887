"""The one table of checkpoint formats: adding one is a module and an entry here."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from megatron_patch.checkpoint.hf import check_hf_target, holds_hf, open_hf, write_hf
from megatron_patch.checkpoint.interface import Format, Source, Target, Written
from megatron_patch.checkpoint.layouts import check_divides, cut
from megatron_patch.checkpoint.mcore import TRACKER, holds_mcore, local_name, megatron_args, open_mcore, publish
from megatron_patch.checkpoint.mcore import write_rank as write_mcore_rank
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry


def _check_mcore(entries: list[Entry], config: ModelConfig, target: Target) -> None:
    for entry in entries:
        check_divides(entry, config, target.tp)


def _write_mcore(directory: Path, entries: list[Entry], config: ModelConfig, source: Source, target: Target) -> Written:
    args = megatron_args(config, target.tp, source.dtype, target.transformer_impl)
    name_of = local_name if target.transformer_impl == "local" else str

    def write_rank(rank: int) -> int:  # returns before the next rank's shards are made
        shards = {name_of(entry.mcore): cut(entry, source.read(entry), rank, target.tp) for entry in entries}
        write_mcore_rank(directory, None, rank, shards, args)
        return sum(shard.nbytes for shard in shards.values())

    size = sum(write_rank(rank) for rank in range(target.tp))
    publish(directory, None, target.tp)
    return Written(len(entries), size)


# Detection takes the first that holds the directory, so a format stands before those whose files resemble its own.
_IN_ORDER = (
    Format("hf", "model.safetensors (or its index)", holds_hf, open_hf, check_hf_target, write_hf),
    Format(
        "mcore", TRACKER, holds_mcore, open_mcore, _check_mcore, _write_mcore, frozenset({"tp", "transformer_impl"})
    ),
)
FORMATS: Mapping[str, Format] = MappingProxyType({format.name: format for format in _IN_ORDER})


def detect_format(directory: Path) -> Format:
    """The format that `directory` holds. Raises FileNotFoundError for none, ValueError for Hugging Face and another."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    held = [format for format in FORMATS.values() if format.holds(directory)]
    if not held:
        markers = ", ".join(dict.fromkeys(format.marker for format in FORMATS.values()))
        raise FileNotFoundError(f"{directory} holds no checkpoint: there is none of {markers}")
    if held[0].name == "hf" and len(held) > 1:
        raise ValueError(f"{directory} holds both a Hugging Face and a Megatron checkpoint; keep one per directory")
    return held[0]
