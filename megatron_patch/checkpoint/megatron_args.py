"""The `args` of a Megatron checkpoint: what its command line would have been, to write and to compare."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.placement import padded_vocabulary
from megatron_patch.config.model import ModelConfig

# Arguments that must agree with config.json wherever a checkpoint records them, and the ModelConfig field.
_ALWAYS_COMPARED = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "norm_epsilon": "norm_epsilon",
    "rotary_base": "rotary_base",
    "num_experts": "num_moe_experts",
}
_GROUPED_QUERY_COMPARED = {"num_query_groups": "num_query_groups", "kv_channels": "kv_channels"}
_LATENT_COMPARED = {
    name: name for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
}
# Sizes that the files themselves show, and the Target field.
_PARALLEL_COMPARED = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vp",
    "decoder_first_pipeline_num_layers": "first_stage_layers",
}
MOST_RANKS = 99999  # along one axis
_NAMESPACES = (argparse.Namespace, SimpleNamespace)  # Megatron's own, and its old converters'
_EXPERT_COMPARED = {"expert_model_parallel_size": "ep", "expert_tensor_parallel_size": "expert_tp"}


def megatron_args(config: ModelConfig, target: Target, dtype: torch.dtype) -> argparse.Namespace:
    """Builtins only, under Megatron's own names."""
    return argparse.Namespace(
        **_dense(config),
        **(_latent(config) if config.is_mla else _grouped_query(config)),
        **_rotary(config),
        **(_experts(config, target) if config.num_moe_experts else {"num_experts": None}),
        **_parallel(config, target),
        padded_vocab_size=padded_vocabulary(config, target.tp),
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        transformer_impl={"te": "transformer_engine", "local": "local"}[target.transformer_impl],
    )


def stored_args(file: Path, payload: Mapping[str, Any]) -> argparse.Namespace | None:
    """The `args` of a file; some converters store a plain dict, some none. Raises ValueError for anything else."""
    args = payload.get("args")
    if args is None:
        return None
    named = args if isinstance(args, dict) else vars(args) if isinstance(args, _NAMESPACES) else None
    if named is not None and all(isinstance(name, str) for name in named):
        return argparse.Namespace(**named)
    raise ValueError(f"{file}: args is {type(args).__name__}, not a namespace; it is not a Megatron checkpoint")


def check_args(file: Path, args: Any, config: ModelConfig, found: Target) -> None:
    """Raise ValueError where `args` contradict config.json, or the layout `found` in the files, with both values."""
    if args is None:
        return  # some converters store none; names and shapes still have to fit
    stored = vars(args)
    for name, field in (_PARALLEL_COMPARED | (_EXPERT_COMPARED if config.num_moe_experts else {})).items():
        if _is_number(stored.get(name)) and stored[name] != getattr(found, field):
            raise ValueError(f"{file}: args.{name} is {stored[name]}, the directory holds {getattr(found, field)}")
    check_architecture(file, args, config)


def check_architecture(file: Path, args: Any, config: ModelConfig) -> None:
    """Raise ValueError where `args` contradict config.json, with both values."""
    if args is None:
        return
    stored = dict(vars(args))
    if stored.get("group_query_attention") is False:
        stored["num_query_groups"] = stored.get("num_attention_heads")
    for name, value in _wanted(config).items():
        if _is_number(stored.get(name)) and stored[name] > 0 and stored[name] != value:  # a vocabulary of 0: unset
            raise ValueError(f"{file}: args.{name} is {stored[name]}, config.json says {value}")


def stored_size(args: Any, name: str) -> int:
    """The size that `args` record under `name`; 1 where they record none that could be one."""
    size = getattr(args, name, None)
    return size if type(size) is int and 1 <= size <= MOST_RANKS else 1


def _wanted(config: ModelConfig) -> dict[str, Any]:
    """The value of each compared argument."""
    compared = _ALWAYS_COMPARED | (_LATENT_COMPARED if config.is_mla else _GROUPED_QUERY_COMPARED)
    if config.num_moe_experts:
        compared["moe_ffn_hidden_size"] = "moe_ffn_hidden_size"
    if not config.is_moe_layer(0):
        compared["ffn_hidden_size"] = "ffn_hidden_size"
    wanted = {name: getattr(config, field) for name, field in compared.items()}
    return wanted | {"vocab_size": config.vocab_size}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _dense(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "norm_epsilon": config.norm_epsilon,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": config.add_qkv_bias,
        "window_size": None if config.window_size is None else (config.window_size - 1, 0),  # excludes the query
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
    }


def _grouped_query(config: ModelConfig) -> dict[str, Any]:
    return {
        "multi_latent_attention": False,
        "group_query_attention": True,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "qk_layernorm": False,
    }


def _latent(config: ModelConfig) -> dict[str, Any]:
    return {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "num_query_groups": 1,  # Megatron's default, which it does not read here
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_head_dim,
        "qk_pos_emb_head_dim": config.qk_pos_emb_head_dim,
        "v_head_dim": config.v_head_dim,
        "qk_layernorm": True,  # without it Megatron-Core gives the latents no norm
        "rope_type": "yarn" if config.rope_type == "yarn" else "rope",
        "mscale": config.mscale,
        "mscale_all_dim": config.mscale_all_dim,
        "beta_fast": config.beta_fast,
        "beta_slow": config.beta_slow,
    }


def _rotary(config: ModelConfig) -> dict[str, Any]:
    """Megatron spells the scaling of llama3 `rope_scaling_factor` and that of yarn `rotary_scaling_factor`."""
    return {
        "position_embedding_type": "rope",
        "rotary_base": config.rotary_base,
        "rotary_percent": 1.0,
        "use_rope_scaling": config.rope_type == "llama3",
        "rope_scaling_factor": config.rotary_scaling_factor,
        "rotary_scaling_factor": config.rotary_scaling_factor,
        "original_max_position_embeddings": config.original_max_position_embeddings,
    }


def _experts(config: ModelConfig, target: Target) -> dict[str, Any]:
    is_limited = config.moe_router_num_groups > 1
    frequency = [int(config.is_moe_layer(layer)) for layer in range(config.num_layers)]
    return {
        "num_experts": config.num_moe_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        # a list, even of ones, makes Megatron-Core look for layers under their own names in a torch_dist checkpoint
        "moe_layer_freq": frequency if 0 in frequency else 1,
        "moe_router_topk": config.moe_router_topk,
        "moe_router_pre_softmax": config.moe_router_pre_softmax,
        "moe_router_topk_scaling_factor": config.moe_router_topk_scaling_factor,
        "moe_router_num_groups": config.moe_router_num_groups if is_limited else None,
        "moe_router_group_topk": config.moe_router_group_topk if is_limited else None,
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size or None,
        "moe_shared_expert_gate": config.moe_shared_expert_gate,
        "moe_grouped_gemm": target.experts == "grouped",
    }


def _parallel(config: ModelConfig, target: Target) -> dict[str, Any]:
    is_interleaved = target.vp > 1
    return {
        "tensor_model_parallel_size": target.tp,
        "pipeline_model_parallel_size": target.pp,
        "decoder_first_pipeline_num_layers": target.first_stage_layers,
        "virtual_pipeline_model_parallel_size": target.vp if is_interleaved else None,
        "expert_model_parallel_size": target.ep,
        "expert_tensor_parallel_size": target.expert_tp,
    }
