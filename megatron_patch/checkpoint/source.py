"""One way to read a checkpoint, whatever its format and layout."""

from pathlib import Path

from megatron_patch.checkpoint.formats import detect_format
from megatron_patch.checkpoint.interface import Source
from megatron_patch.checkpoint.upcycle import upcycle
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.families import ALL
from megatron_patch.families.family import Family
from megatron_patch.families.manifest import manifest
from megatron_patch.families.resolve import from_checkpoint
from megatron_patch.families.upcycle import Upcycling


def open_checkpoint(directory: str | Path, family: Family, config: ModelConfig) -> Source:
    """Open the checkpoint in `directory`; `.read(entry)` is the full tensor of a manifest entry, in mcore orientation.

    Opening holds names, shapes and types against the manifest, so that a read cannot be a surprise. A rank's tensor is
    `layouts.cut(entry, source.read(entry), rank, size)`. Raises ValueError or FileNotFoundError in one sentence.
    """
    directory = Path(directory)
    return detect_format(directory).open(directory, manifest(family, config), config)


def open_start_weights(run: RunConfig) -> Source:
    """What `run` loads, under its own manifest; the MLP of a dense checkpoint that it upcycles becomes the experts.

    Raises as `open_checkpoint`, and ValueError for weights that cannot become the experts of this run.
    """
    load, family = run.checkpoint.load, ALL[run.family]
    if not run.checkpoint.upcycle:
        return open_checkpoint(load, family, run.model)
    dense = from_checkpoint(tuple(ALL), "auto", load)
    if dense.config.num_moe_experts or dense.config.ffn_hidden_size != run.model.moe_ffn_hidden_size:
        raise ValueError(
            f"{load}/config.json describes {dense.config.num_moe_experts} experts and an MLP "
            f"{dense.config.ffn_hidden_size} wide; the {run.model.num_moe_experts} experts of this run are made of a "
            f"dense model's, {run.model.moe_ffn_hidden_size} wide"
        )
    how = Upcycling(
        num_moe_experts=run.model.num_moe_experts, moe_router_topk=run.model.moe_router_topk, seed=run.data.seed
    )
    source = open_checkpoint(load, dense.family, dense.config)
    return upcycle(source, manifest(dense.family, dense.config), how)
