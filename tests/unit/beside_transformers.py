"""A tiny model of any family twice: in transformers, and ours read from the files that transformers writes of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.families.resolve import read_config
from megatron_patch.model.build import build_model
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import single_process
from megatron_patch.weights.load import load_weights
from megatron_patch.weights.parameters import entry_tensors

VOCABULARY = 101
DENSE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
TINY: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "mistral": (MistralConfig, DENSE | {"sliding_window": None}),
    "mixtral": (MixtralConfig, DENSE | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "llama": (LlamaConfig, DENSE),
    "qwen1_5": (Qwen2Config, DENSE),
    "qwen1_5_moe": (
        Qwen2MoeConfig,
        DENSE
        | {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v2": (
        DeepseekV2Config,
        DENSE
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "n_shared_experts": 2,
            "q_lora_rank": None,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "rope_parameters": YARN,
        },
    ),
}


def peer(family: str, **options) -> PreTrainedModel:
    """transformers' model, with weights large enough for attention and routing to be sharp; its experts in a loop."""
    torch.manual_seed(1)
    kind, tiny = TINY[family]
    model = AutoModelForCausalLM.from_config(kind(**tiny | options), experts_implementation="eager")
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def ours(directory: Path, family: str) -> GPTModel:
    """Our model of the checkpoint in `directory`."""
    config = ALL[family].config(read_config(directory))
    source = open_checkpoint(directory, ALL[family], config)
    (model,) = build_model(config, ParallelConfig(), "fp32", single_process())
    load_weights([model], manifest(ALL[family], config), source, single_process())
    return model


def our_gradients(model: GPTModel) -> dict[str, torch.Tensor]:
    """By manifest name."""
    return {
        name: gradient
        for parameter, value in model.named_parameters()
        for name, gradient in entry_tensors(parameter, value.grad, single_process())
    }


def peer_gradients(model: PreTrainedModel, directory: Path, family: str) -> Iterator[tuple[str, torch.Tensor]]:
    """By manifest name: written by transformers as if they were weights, so that its own code names and splits them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(directory)
    config = ALL[family].config(read_config(directory))
    source = open_checkpoint(directory, ALL[family], config)
    return ((entry.mcore, source.read(entry)) for entry in manifest(ALL[family], config))
