"""Tiny Hugging Face directories of every family, made without transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_patch.checkpoint.layouts import part_shapes
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest

VOCABULARY = 22
DENSE = {
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "mistral": DENSE | {"sliding_window": 4, "rms_norm_eps": 1e-5},
    "mixtral": DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "llama": DENSE,
    "qwen1_5": DENSE,
    "qwen1_5_moe": DENSE
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16},
    "deepseek_v2": DENSE
    | {
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "q_lora_rank": None,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 4,
        "topk_method": "greedy",
    },
}


def write_model(directory: Path, family: str) -> dict[str, torch.Tensor]:
    """Random weights, config.json and a tokenizer of two tokens fewer than the vocabulary; returns the tensors."""
    hf = CONFIGS[family] | {
        "architectures": [ALL[family].architecture],
        "model_type": ALL[family].model_type,
        "torch_dtype": "float32",
    }
    config = ALL[family].config(hf)
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape)
        for entry in manifest(ALL[family], config)
        for name, shape in zip(entry.hf, part_shapes(entry, config), strict=True)
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf))
    vocabulary = {str(number): number for number in range(VOCABULARY - 2)}
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return tensors


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face directory."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def are_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same names with the same bits and types."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )
