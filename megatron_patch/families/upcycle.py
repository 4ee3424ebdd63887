"""A dense architecture as a mixture of experts made from its own MLP: which family can hold it, and its config.json."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_patch.config.model import ModelConfig
from megatron_patch.families import ALL
from megatron_patch.families.family import Family

BALANCE = 0.01  # weight of the load balancing loss, as Megatron-Core advises

# What config.json says of the tokenizer and no ModelConfig field stands for.
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How the MLP of each layer becomes experts. ModelConfig's names; `num_splits` and `padding` are ours.

    Expert i is part i mod `num_splits` of the dense MLP, gate and up each widened to `moe_ffn_hidden_size` (None: the
    part's own width). `padding` is what widens them: draws from N(0, 0.02), like the router and the shared expert, or
    zeros, which leave the part's function unchanged.
    """

    num_moe_experts: int
    moe_router_topk: int
    num_splits: int = 1
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int = 0
    moe_router_pre_softmax: bool = False
    padding: str = "normal"  # normal | zeros
    seed: int = 1234


def check_upcycling(config: ModelConfig, upcycling: Upcycling) -> None:
    """Raise ValueError, in one sentence, for a model or for numbers that cannot be upcycled."""
    u, width = upcycling, config.ffn_hidden_size
    if config.num_moe_experts:
        raise ValueError(f"the model already has {config.num_moe_experts} experts; only a dense one is upcycled")
    if not 1 <= u.num_splits <= u.num_moe_experts:
        raise ValueError(f"num_splits is {u.num_splits}; {u.num_moe_experts} experts can hold 1 to as many parts")
    if not 1 <= u.moe_router_topk <= u.num_moe_experts:
        raise ValueError(f"moe_router_topk is {u.moe_router_topk}; 1 to {u.num_moe_experts} experts can be chosen")
    if width % u.num_splits:
        raise ValueError(f"num_splits {u.num_splits} does not divide the MLP's width {width}; choose a divisor")
    if u.moe_ffn_hidden_size is not None and u.moe_ffn_hidden_size < width // u.num_splits:
        raise ValueError(f"moe_ffn_hidden_size {u.moe_ffn_hidden_size} is below a part's width {width // u.num_splits}")
    if u.moe_shared_expert_intermediate_size < 0:
        raise ValueError(f"moe_shared_expert_intermediate_size is {u.moe_shared_expert_intermediate_size}; 0 is none")
    if u.padding not in ("normal", "zeros"):
        raise ValueError(f"padding is {u.padding!r}; it must be normal or zeros")


def resolve_upcycled(config: ModelConfig, upcycling: Upcycling) -> tuple[Family, ModelConfig]:
    """The first family that can express `config` as a mixture of experts, and its architecture.

    Raises ValueError where the numbers cannot work, or no family's config.json has room for all of them.
    """
    check_upcycling(config, upcycling)
    width = upcycling.moe_ffn_hidden_size or config.ffn_hidden_size // upcycling.num_splits
    wanted = dataclasses.replace(
        config,
        num_moe_experts=upcycling.num_moe_experts,
        moe_router_topk=upcycling.moe_router_topk,
        ffn_hidden_size=width,  # no layer stays dense, and some families have one key for both
        moe_ffn_hidden_size=width,
        moe_shared_expert_intermediate_size=upcycling.moe_shared_expert_intermediate_size,
        moe_router_pre_softmax=upcycling.moe_router_pre_softmax,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=BALANCE,
    )
    lost = {}
    for family in ALL.values():
        if "num_moe_experts" in family.keys and "kv_lora_rank" not in family.keys:
            found = family.config(family.hf_config(wanted, "float32"))
            lost[family.name] = _differences(wanted, found)
            if not lost[family.name]:
                return family, found
    told = "; ".join(f"{name} has no room for {', '.join(fields)}" for name, fields in lost.items())
    raise ValueError(f"no family can hold this model as a mixture of experts: {told}")


def upcycled_hf_config(dense: Mapping[str, Any], family: Family, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of the mixture, with what the `dense` one says of the tokenizer."""
    return family.hf_config(config, dtype) | {key: dense[key] for key in _CARRIED if key in dense}


def _differences(wanted: ModelConfig, found: ModelConfig) -> list[str]:
    """Fields that a config.json did not carry; whether the shared expert is gated is the family's own to say."""
    names = (field.name for field in dataclasses.fields(ModelConfig) if field.name != "moe_shared_expert_gate")
    return [name for name in names if getattr(wanted, name) != getattr(found, name)]
