"""The one table of checkpoint formats: adding one is a module and an entry here."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from megatron_patch.checkpoint.hf import check_hf_target, holds_hf, open_hf, write_hf
from megatron_patch.checkpoint.interface import Format
from megatron_patch.checkpoint.legacy import LEGACY_FORMATS
from megatron_patch.checkpoint.mcore import TRACKER, check_mcore, holds_mcore, write_mcore
from megatron_patch.checkpoint.mcore_source import open_mcore
from megatron_patch.checkpoint.torch_dist import (
    check_torch_dist,
    holds_torch_dist,
    open_torch_dist,
    write_torch_dist,
)

_MCORE_LAYOUT = ("tp", "pp", "ep", "etp", "vp", "first_stage_layers", "transformer_impl", "experts")

# Detection takes the first that holds the directory, so a format stands before those whose files resemble its own.
_IN_ORDER = (
    Format("hf", "model.safetensors, pytorch_model.bin (or their index)", holds_hf, open_hf, check_hf_target, write_hf),
    Format(
        "torch_dist",
        TRACKER,
        holds_torch_dist,
        open_torch_dist,
        check_torch_dist,
        write_torch_dist,
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
