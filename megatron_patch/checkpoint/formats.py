"""The one table of checkpoint formats: adding one is a module and an entry here."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from megatron_patch.checkpoint.hf import holds_hf, open_hf, write_hf
from megatron_patch.checkpoint.interface import Format, Source, Target, Written
from megatron_patch.checkpoint.legacy import LEGACY_FORMATS
from megatron_patch.checkpoint.mcore import check_mcore, holds_mcore, latest_directory, write_mcore
from megatron_patch.checkpoint.mcore_source import open_mcore
from megatron_patch.config.checkpoint import TRACKER
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry

_TORCH_DIST_FILES = ("common.pt", "metadata.json")
_MCORE_LAYOUT = ("tp", "pp", "ep", "etp", "vp", "first_stage_layers", "transformer_impl", "experts")


def _holds_dcp(directory: Path) -> bool:
    """Whether it has torch_dist's index and nothing else of Megatron-Core's."""
    try:
        iteration = latest_directory(directory)
    except (OSError, ValueError):
        return False
    return (iteration / ".metadata").is_file() and not any((iteration / name).exists() for name in _TORCH_DIST_FILES)


def _holds_torch_dist(directory: Path) -> bool:
    try:
        return (latest_directory(directory) / ".metadata").is_file()
    except (OSError, ValueError):
        return False


# Imported when used: torch.distributed.checkpoint takes half as long to load as torch itself.
def _open_dcp(directory: Path, entries: list[Entry], config: ModelConfig) -> Source:
    from megatron_patch.checkpoint.dcp_source import open_dcp

    return open_dcp(directory, entries, config)


def _write_dcp(directory: Path, entries: list[Entry], config: ModelConfig, source: Source, target: Target) -> Written:
    from megatron_patch.checkpoint.dcp import write_dcp

    return write_dcp(directory, entries, config, source, target)


def _open_torch_dist(directory: Path, entries: list[Entry], config: ModelConfig) -> Source:
    from megatron_patch.checkpoint.torch_dist import open_torch_dist

    return open_torch_dist(directory, entries, config)


def _write_torch_dist(
    directory: Path, entries: list[Entry], config: ModelConfig, source: Source, target: Target
) -> Written:
    from megatron_patch.checkpoint.torch_dist import write_torch_dist

    return write_torch_dist(directory, entries, config, source, target)


def _refuse_nothing(entries: list[Entry], config: ModelConfig, target: Target) -> None:
    """Tensors are written whole."""


# Detection takes the first that holds the directory, so a format stands before those whose files resemble its own.
_IN_ORDER = (
    Format("hf", "model.safetensors, pytorch_model.bin (or their index)", holds_hf, open_hf, _refuse_nothing, write_hf),
    Format("dcp", TRACKER, _holds_dcp, _open_dcp, _refuse_nothing, _write_dcp),
    Format(
        "torch_dist",
        TRACKER,
        _holds_torch_dist,
        _open_torch_dist,
        _refuse_nothing,
        _write_torch_dist,
        frozenset({"transformer_impl"}),
    ),
    *LEGACY_FORMATS,
    Format("mcore", TRACKER, holds_mcore, open_mcore, check_mcore, write_mcore, frozenset(_MCORE_LAYOUT)),
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
