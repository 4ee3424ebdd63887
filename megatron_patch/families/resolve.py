"""From what the user named, a size and a checkpoint directory, to one family and one architecture."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.config.model import ModelConfig
from megatron_patch.families import ALL
from megatron_patch.families.family import Family, shown


@dataclass(frozen=True)
class Resolved:
    """A family, an architecture, and what the user should know about how they were chosen."""

    family: Family
    config: ModelConfig
    warnings: tuple[str, ...] = ()


def preset(families: tuple[str, ...], size: str) -> Resolved:
    """The architecture of a size alone. `auto` raises ValueError: it needs a checkpoint."""
    for name in families:
        if size in ALL[name].sizes:
            return Resolved(ALL[name], ALL[name].config(ALL[name].sizes[size]))
    raise ValueError(f"MODEL_SIZE {size!r} takes the architecture from a checkpoint's config.json, and there is none")


def from_checkpoint(families: tuple[str, ...], size: str, directory: str | Path) -> Resolved:
    """The architecture in `directory`/config.json, held against the preset of `size`.

    Raises ValueError when a shape differs or the file cannot be used, FileNotFoundError when there is none.
    """
    hf = read_config(directory)
    family = by_architecture(hf, families, directory)
    config = family.config(hf)
    if size == "auto":
        return Resolved(family, config)
    if size not in family.sizes:
        raise ValueError(f"MODEL_SIZE is {size!r}, but {directory}/config.json describes {family.name}; use auto")
    return Resolved(family, config, tuple(_differences(family, size, config, directory)))


def read_config(directory: str | Path) -> dict[str, Any]:
    """`directory`/config.json. Raises FileNotFoundError or ValueError in one sentence."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint directory holds its config.json")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except ValueError:
        raise ValueError(f"{path} holds a number of thousands of digits; no setting has such a value") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a config.json") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{path} holds {type(hf).__name__}, not an object")
    return hf


def by_architecture(hf: Mapping[str, Any], families: tuple[str, ...], directory: str | Path) -> Family:
    """The family whose architecture `hf` names."""
    listed = hf.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed else None
    for family in (ALL[name] for name in families):
        if family.architecture == named:
            if hf.get("model_type", family.model_type) != family.model_type:
                told = f"model_type is {shown(hf['model_type'])}, but {named} is {family.model_type}"
                raise ValueError(f"{directory}/config.json: {told}; correct one of them")
            return family
    known = ", ".join(ALL[name].architecture for name in families)
    raise ValueError(f"{directory}/config.json: architectures[0] is {shown(named)}; supported here: {known}")


def _differences(family: Family, size: str, config: ModelConfig, directory: str | Path) -> list[str]:
    """Warnings for what `config.json` overrides; ValueError where the preset's shape contradicts it."""
    wanted = family.config(family.sizes[size])
    shapes, warnings = [], []
    for field, key in family.keys.items():
        ours, theirs = key.written(field, wanted), key.written(field, config)
        if ours == theirs or not key.hf:
            continue
        if key.is_shape:
            shapes.append(f"{key.hf[0]} is {theirs} in {directory}/config.json and {ours} in MODEL_SIZE {size}")
        else:
            warnings.append(f"{key.hf[0]} {theirs} comes from {directory}/config.json (MODEL_SIZE {size} has {ours})")
    if shapes:
        raise ValueError("; ".join(shapes) + "; name the matching size, or auto")
    return warnings
