"""The architecture that a training launcher names: the checkpoint's own, or with MOE the mixture made of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_patch.config.model import ModelConfig
from megatron_patch.families import ALL
from megatron_patch.families.resolve import Resolved, from_checkpoint, preset
from megatron_patch.families.upcycle import Upcycling, resolve_upcycled
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.launch.size import resolve_size

# What a mixture keeps of the dense model it was made of.
KEPT = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


class Architecture(NamedTuple):
    """What is trained, what is not there yet, and whether the start weights are dense and become a mixture."""

    resolved: Resolved
    absent: list[str]
    is_upcycled: bool = False


def start_weights(values: Mapping[str, Any]) -> str | None:
    """The directory in PRETRAIN_CHECKPOINT_PATH; None for `none`: start from random weights."""
    path = values["PRETRAIN_CHECKPOINT_PATH"]
    return None if path.lower() == "none" else path


def resolve_architecture(request: Request) -> Architecture:
    """Raises UsageError or ValueError for a size or a mixture that the checkpoint contradicts."""
    v, where = request.values, request.where("MODEL_SIZE")
    load, size = start_weights(v), v["MODEL_SIZE"]
    mixture = _mixture_in(request.families, size, load) if v.get("MOE") and load is not None else None
    if mixture is not None:
        return Architecture(mixture, [])
    described = load if load is not None else _described(v.get("TOKENIZER"))
    resolved, absent = resolve_size(request.families, size, described, where)
    has_experts = resolved.config.num_moe_experts > 0
    if "MOE" in v and has_experts and not v["MOE"]:
        raise UsageError(f"{request.where('MOE')} is false, and {load or size} has experts; use true")
    if has_experts or not v.get("MOE"):
        return Architecture(resolved, absent)
    how = Upcycling(num_moe_experts=v["NUM_EXPERTS"], moe_router_topk=v["EXPERTS_TOPK"])
    return Architecture(
        Resolved(*resolve_upcycled(resolved.config, how), resolved.warnings), absent, is_upcycled=load is not None
    )


def _described(tokenizer: str | None) -> str | None:
    """A tokenizer's directory that describes a model too."""
    return tokenizer if tokenizer and (Path(tokenizer) / "config.json").is_file() else None


def _mixture_in(families: tuple[str, ...], size: str, directory: str) -> Resolved | None:
    """The mixture that `directory` describes, made of a dense `size` or of that size itself; None where it does not."""
    try:
        found = from_checkpoint(tuple(ALL), "auto", directory)
    except FileNotFoundError:
        return None
    if not found.config.num_moe_experts:
        return None
    if size == "auto" or size in found.family.sizes:
        return from_checkpoint((found.family.name,), size, directory)
    _check_kept(found.config, preset(families, size).config, directory, size)
    return found


def _check_kept(config: ModelConfig, dense: ModelConfig, directory: str, size: str) -> None:
    pairs = [(name, getattr(config, name), getattr(dense, name)) for name in KEPT]
    pairs.append(("moe_ffn_hidden_size", config.moe_ffn_hidden_size, dense.ffn_hidden_size))
    wrong = [f"{name} is {ours} in {directory}/config.json and {other}" for name, ours, other in pairs if ours != other]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)} in MODEL_SIZE {size}; name the matching size, or auto")
