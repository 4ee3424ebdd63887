"""One way to read a checkpoint, whatever its format and layout."""

from pathlib import Path

from megatron_patch.checkpoint.formats import detect_format
from megatron_patch.checkpoint.interface import Source
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.family import Family
from megatron_patch.families.manifest import manifest


def open_checkpoint(directory: str | Path, family: Family, config: ModelConfig) -> Source:
    """Open the checkpoint in `directory`; `.read(entry)` is the full tensor of a manifest entry, in mcore orientation.

    Opening holds names, shapes and types against the manifest, so that a read cannot be a surprise. A rank's tensor is
    `layouts.cut(entry, source.read(entry), rank, size)`. Raises ValueError or FileNotFoundError in one sentence.
    """
    directory = Path(directory)
    return detect_format(directory).open(directory, manifest(family, config), config)
