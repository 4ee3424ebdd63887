"""What a converter's arguments must agree with: the architecture, the tokenizer, and each other."""

import re
from pathlib import Path

from megatron_patch.config.model import ModelConfig
from megatron_patch.families.family import Family
from megatron_patch.families.manifest import parameter_count
from megatron_patch.families.upcycle import Upcycling, resolve_upcycled
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.launch.vocabulary import tokenizer_size

# Settings of an upcycling that a message names, as the user typed them.
CAPITALS = (
    ("num_moe_experts", "NUM_EXPERTS"),
    ("moe_router_topk", "EXPERTS_TOPK"),
    ("num_splits", "NUM_SPLITS"),
    ("num_splits", "NUM_EXPERT_SPLITS"),
    ("moe_ffn_hidden_size", "MOE_FFN"),
)
SHARED_WIDTHS = 4  # the shared expert of a fine-grained mixture is as wide as four routed ones


def upcycling(request: Request, config: ModelConfig | None) -> Upcycling | None:
    """How a dense model becomes experts; None where that was not asked for, or the model has experts."""
    v = request.values
    if not v.get("NUM_EXPERTS") or v.get("mg2hf") or (config is not None and config.num_moe_experts):
        return None
    splits, width = v.get("NUM_SPLITS") or v.get("NUM_EXPERT_SPLITS") or 1, v.get("MOE_FFN")
    return Upcycling(
        num_moe_experts=v["NUM_EXPERTS"],
        moe_router_topk=v.get("EXPERTS_TOPK", splits),
        num_splits=splits,
        moe_ffn_hidden_size=width,
        moe_shared_expert_intermediate_size=SHARED_WIDTHS * width if width else 0,
    )


def upcycled(request: Request, config: ModelConfig, how: Upcycling) -> tuple[Family, ModelConfig]:
    """The mixture that a dense `config` becomes. Raises UsageError, in the user's words, where it cannot."""
    try:
        return resolve_upcycled(config, how)
    except ValueError as error:
        raise UsageError(_as_typed(request, str(error))) from None


def parameters(request: Request, family: Family, config: ModelConfig) -> int:
    """How many `config` has. Raises UsageError, in the user's words, where no such model fits anywhere."""
    try:
        return parameter_count(family, config)
    except ValueError as error:
        raise UsageError(_as_typed(request, str(error))) from None


def _as_typed(request: Request, sentence: str) -> str:
    """`sentence` with the arguments in place of the settings that they are."""
    names = {field: name for field, name in CAPITALS if name in request.values}
    if not names:
        return sentence
    return re.sub(rf"\b({'|'.join(names)})\b", lambda match: request.where(names[match[0]]), sentence)


def expert_problems(request: Request, config: ModelConfig | None, *, is_read: bool) -> list[str]:
    """Sentences about experts that were named and that `config` has otherwise. 0 is not named.

    `is_read`: the config is a file's, not a size's; a dense model on its way back may have become a mixture since.
    """
    if config is None:
        return []
    if not config.num_moe_experts:
        wrong = is_read and request.values.get("NUM_EXPERTS")
        return [f"{request.where('NUM_EXPERTS')} is {wrong}, and config.json describes none; use 0"] if wrong else []
    claims = (("NUM_EXPERTS", config.num_moe_experts), ("EXPERTS_TOPK", config.moe_router_topk))
    return [
        f"{request.where(name)} is {request.values[name]}, and config.json says {actual}; use {actual}, or 0"
        for name, actual in claims
        if request.values.get(name) and request.values[name] != actual
    ]


def division_problems(request: Request, config: ModelConfig | None) -> list[str]:
    """Sentences about parallel sizes into which `config`, the model that is written, cannot be cut."""
    v, problems = request.values, []
    tp, pp, ep = v["TP"], v["PP"], v.get("EP") or 1
    experts = config.num_moe_experts if config else 0
    if v.get("WS") and experts and v["WS"] != tp * pp * ep:
        problems.append(f"{request.where('WS')} is {v['WS']}, but TP {tp} × PP {pp} × EP {ep} = {tp * pp * ep}")
    if v.get("mg2hf"):
        return problems  # the checkpoint knows its own layout
    if ep > 1 and config is not None and not experts:
        problems.append(f"{request.where('EP')} is {ep}, but the model has no experts; use 0")
    elif experts % ep:
        problems.append(f"{request.where('EP')} is {ep}, which does not divide {experts} experts; use a divisor")
    if config is None:
        return problems
    heads, kind = (
        (config.num_attention_heads, "attention heads") if config.is_mla else (config.num_query_groups, "query groups")
    )
    if heads % tp:
        problems.append(f"{request.where('TP')} is {tp}, which does not divide {heads} {kind}; use a divisor")
    return problems + _stage_problems(request, config.num_layers)


def _stage_problems(request: Request, layers: int) -> list[str]:
    pp, first = request.values["PP"], request.values.get("MP_PP0_LAYERS", 0)
    where = request.where("PP")
    if pp == 1 or not first:
        return [f"{where} is {pp}, which does not divide {layers} layers; use a divisor"] if layers % pp else []
    rest = layers - first
    if rest < pp - 1 or rest % (pp - 1):
        first_stage = request.where("MP_PP0_LAYERS")
        return [
            f"{first_stage} is {first}: {max(rest, 0)} of {layers} layers do not fill {pp - 1} equal stages "
            f"({where} is {pp})"
        ]
    return []


def vocabulary(request: Request, config: ModelConfig | None, directory: Path) -> tuple[list[str], list[str]]:
    """Problems and warnings about EXTRA_VOCAB_SIZE: with the tokenizer's size it must make config.json's vocab_size."""
    extra = request.values.get("EXTRA_VOCAB_SIZE", 0)
    if not extra:
        return [], []
    where, size = request.where("EXTRA_VOCAB_SIZE"), tokenizer_size(directory)
    if size is None or config is None:
        return [], [f"{where} is {extra}: not checked, {directory} holds no tokenizer that could be counted"]
    if size + extra != config.vocab_size:
        fitting = max(config.vocab_size - size, 0)
        return [
            f"{where} is {extra}: the tokenizer's {size} + {extra} are not config.json's vocab_size "
            f"{config.vocab_size}; use {fitting}, or 0"
        ], []
    return [], []


def without_effect(request: Request, config: ModelConfig | None) -> list[str]:
    """What has no effect on this model, and what was chosen because no argument says it."""
    v = request.values
    is_dense = config is not None and not config.num_moe_experts and not v.get("NUM_EXPERTS")
    lonely = [name for name in ("WS", "EXPERTS_TOPK", "NUM_EXPERT_SPLITS") if is_dense and v.get(name)]
    sentences = [f"{request.where(name)} is {v[name]}: no effect without experts" for name in lonely]
    if v.get("MP_PP0_LAYERS") and v["PP"] == 1:
        sentences += [f"{request.where('MP_PP0_LAYERS')} has no effect without pipeline parallelism (PP is 1)"]
    if v.get("NUM_EXPERTS") and "EXPERTS_TOPK" not in v and not v.get("mg2hf"):
        chosen = f"{v['NUM_SPLITS']}, the number of splits" if "NUM_SPLITS" in v else "1"
        sentences += [f"no argument says how many experts a token is sent to; chosen: {chosen}"]
    return sentences
