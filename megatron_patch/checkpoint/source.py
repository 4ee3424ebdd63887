"""One way to read a checkpoint, whatever its format and layout."""

from pathlib import Path

from megatron_patch.checkpoint.hf import HfSource, holds_hf, open_hf
from megatron_patch.checkpoint.mcore import McoreSource, holds_mcore, open_mcore
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.family import Family
from megatron_patch.families.manifest import manifest


def open_checkpoint(directory: str | Path, family: Family, config: ModelConfig) -> HfSource | McoreSource:
    """Open the checkpoint in `directory`; `.read(entry)` is the full tensor of a manifest entry, in mcore orientation.

    Opening holds names, shapes and types against the manifest, so that a read cannot be a surprise. A rank's tensor is
    `layouts.cut(entry, source.read(entry), rank, size)`. Raises ValueError or FileNotFoundError in one sentence.
    """
    directory = Path(directory)
    if detect_format(directory) == "hf":
        return open_hf(directory, manifest(family, config), config)
    return open_mcore(directory, manifest(family, config), config)


def detect_format(directory: Path) -> str:
    """`hf` or `mcore`, by the files that `directory` holds."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    is_hf, is_mcore = holds_hf(directory), holds_mcore(directory)
    if is_hf and is_mcore:
        raise ValueError(f"{directory} holds both a Hugging Face and a Megatron checkpoint; keep one per directory")
    if not is_hf and not is_mcore:
        raise FileNotFoundError(
            f"{directory} holds no checkpoint: neither model.safetensors (or its index) "
            "nor latest_checkpointed_iteration.txt"
        )
    return "hf" if is_hf else "mcore"
