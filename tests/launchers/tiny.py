"""Tiny Hugging Face directories of every family, made without transformers, and data and commands to train them."""

import json
from pathlib import Path

import numpy as np
import torch
from commands import ROOT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_patch.checkpoint.layouts import part_shapes
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.launch.positional import Table

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


SCRIPTS = {  # launcher → script, and the family of the tiny model it trains
    "mistral": ("mistral/run_mcore_mistral.sh", "mistral"),
    "deepseek": ("deepseek_v2/run_mcore_deepseek.sh", "deepseek_v2"),
    "llama-pretrain": ("llama/run_pretrain_megatron_llama.sh", "llama"),
    "llama-finetune": ("llama/run_finetune_megatron_llama.sh", "llama"),
    "llama-mcore-pretrain": ("llama/run_pretrain_mcore_llama.sh", "llama"),
    "llama-mcore-finetune": ("llama/run_finetune_mcore_llama_withGA.sh", "llama"),
    "qwen-pretrain": ("qwen1_5/run_pretrain_megatron_qwen.sh", "qwen1_5"),
    "qwen-finetune": ("qwen1_5/run_finetune_megatron_qwen.sh", "qwen1_5"),
    "qwen-finetune-ga": ("qwen1_5/run_finetune_megatron_qwen_withGA.sh", "qwen1_5"),
    "qwen-mcore-pretrain": ("qwen1_5/run_pretrain_mcore_qwen.sh", "qwen1_5"),
    "qwen-mcore-finetune": ("qwen1_5/run_finetune_mcore_qwen_withGA.sh", "qwen1_5"),
    "qwen-megablocks-pretrain": ("qwen1_5/run_pretrain_megablocks_qwen.sh", "qwen1_5"),
    "qwen-megablocks-finetune": ("qwen1_5/run_finetune_megablocks_qwen_withGA.sh", "qwen1_5"),
}
RECORDS = 9
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
TINY_VALUES = {
    "ENV": "dsw", "MEGATRON_PATCH_PATH": "../..", "MODEL_SIZE": "auto", "BATCH_SIZE": "2", "GLOBAL_BATCH_SIZE": "4",
    "LR": "1e-3", "MIN_LR": "1e-4", "SEQ_LEN": "16", "PAD_LEN": "32", "EXTRA_VOCAB_SIZE": "0", "PR": "fp32", "TP": "1",
    "PP": "1", "CP": "1", "EP": "1", "SP": "false", "DO": "false", "FL": "true", "SFT": "false", "TE": "false",
    "MOE": "true", "AC": "false", "OPTIMIZER_OFFLOAD": "false", "SAVE_INTERVAL": "100", "DATASET_PATH": "tokens",
    "VALID_DATASET_PATH": "tokens", "TRAIN_TOKENS_OR_ITERS": "128", "WARMUP_TOKENS_OR_ITERS": "64",
    "TRAIN_TOKENS": "128", "WARMUP_TOKENS": "64", "TRAIN_ITERS": "2", "WARMUP_ITERS": "0", "EPOCH": "2",
    "OUTPUT_BASEPATH": "out",
}  # fmt: skip


def script_of(launcher: str) -> Path:
    """The script that runs `launcher`."""
    return ROOT / "examples" / SCRIPTS[launcher][0]


def write_material(folder: Path, *families: str) -> None:
    """For each family a model, and beside them a tokenizer, and tokens and records to train them on."""
    for family in families:
        write_model(folder / family, family)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    settings = {"unk_token": "w0", "eos_token": "w1", "pad_token": "w2", "chat_template": CHAT}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder / "words")
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (200, 20))
    with IndexedDatasetBuilder(folder / "tokens", "uint16") as builder:
        builder.add(tokens.ravel(), [20] * 200, [1] * 200)
    for split in ("train", "valid"):
        record = json.dumps({"instruction": "w3", "input": "", "output": "w5"})
        (folder / f"{split}.json").write_text(f"{record}\n" * RECORDS)


def tiny_command(table: Table, family: str, **changes: str) -> list[str]:
    """The arguments of a short run of what `write_material` wrote, with some of them, by name, replaced."""
    of_records = {"TRAIN_DATASET_PATH": "train.json", "PRETRAIN_CHECKPOINT_PATH": family}
    if any(arg.name == "TRAIN_DATASET_PATH" for arg in table):
        of_records["VALID_DATASET_PATH"] = "valid.json"
    values = TINY_VALUES | of_records | changes
    return [*(values[arg.name] for arg in table), *("--tokenizer-model", "words", "--eval-iters", "1")]
