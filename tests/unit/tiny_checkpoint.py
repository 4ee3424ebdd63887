"""A tiny random Mistral as a Hugging Face directory, made without transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_patch.checkpoint.layouts import part_shapes
from megatron_patch.families.manifest import manifest
from megatron_patch.families.mistral import MISTRAL

CONFIG_JSON = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 21,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "sliding_window": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
CONFIG = MISTRAL.config(CONFIG_JSON)
ENTRIES = manifest(MISTRAL, CONFIG)


def hf_tensors(dtype: torch.dtype = torch.float32, config=CONFIG) -> dict[str, torch.Tensor]:
    """Random tensors under their Hugging Face names."""
    torch.manual_seed(0)
    return {
        name: torch.randn(shape).to(dtype)
        for entry in manifest(MISTRAL, config)
        for name, shape in zip(entry.hf, part_shapes(entry, config), strict=True)
    }


def write_directory(directory: Path, tensors: dict[str, torch.Tensor], **changed) -> Path:
    """A single-file checkpoint of `tensors`, its config.json with `changed` keys."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG_JSON | changed))
    return directory
