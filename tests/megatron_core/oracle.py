"""Tiny models of every family, the layouts they divide into, and Megatron-Core's logits of our files."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from megatron_patch import convert
from megatron_patch.checkpoint.interface import Target

READER = Path(__file__).with_name("reader.py")
VOCABULARY = 101  # needs padding on more than one rank
DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
LATENT = DENSE | {
    "num_attention_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 4,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,  # Megatron-Core knows no other
}
FAMILIES = {
    "Mistral": transformers.MistralConfig(**DENSE, head_dim=8, sliding_window=4),
    "LLaMA 3.1": transformers.LlamaConfig(**DENSE | {"max_position_embeddings": 131072}, rope_parameters=LLAMA3),
    "Qwen1.5": transformers.Qwen2Config(**DENSE),
    "Qwen1.5, tied": transformers.Qwen2Config(**DENSE, tie_word_embeddings=True),
    "Mixtral": transformers.MixtralConfig(**DENSE, num_local_experts=8, num_experts_per_tok=2),
    "Qwen1.5-MoE": transformers.Qwen2MoeConfig(
        **DENSE,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        norm_topk_prob=False,
    ),
    "DeepSeek-V2-Lite": transformers.DeepseekV2Config(**LATENT | {"num_key_value_heads": 4}),
    # Megatron-Core scores a group by a sum, the model by a maximum: the same for one expert of each chosen group.
    "DeepSeek-V2": transformers.DeepseekV2Config(
        **LATENT
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        }
    ),
}
MOE = ("Mixtral", "Qwen1.5-MoE", "DeepSeek-V2-Lite", "DeepSeek-V2")
PIPELINES = ({}, {"pp": 2}, {"pp": 2, "first_stage_layers": 1}, {"pp": 2, "vp": 2})


def layouts(family: str) -> Iterator[Target]:
    """TP {1, 2, 4} × PP {1, 2, uneven, interleaved} × EP {1, 2, 4} × expert-TP {as TP, 1}, as far as it is legal."""
    for tp, pipeline, ep in itertools.product((1, 2, 4), PIPELINES, (1, 2, 4) if family in MOE else (1,)):
        yield Target(tp=tp, ep=ep, transformer_impl="local", **pipeline)
        if tp > 1 and family in MOE:
            yield Target(tp=tp, ep=ep, etp=1, transformer_impl="local", **pipeline)


def write_source(family: str, directory: Path) -> torch.Tensor:
    """Save a random model and tokens longer than its window; returns transformers' logits of them."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # norms of one would hide a swap
            else:
                parameter.normal_(0, 0.2)  # large enough for every weight to show in the logits
        model.save_pretrained(directory)
        tokens = torch.randint(0, VOCABULARY, (2, 12))
        torch.save(tokens, directory / "tokens.pt")
        return model(tokens).logits


def without_window(source: Path) -> torch.Tensor:
    """The logits that a model blind to its sliding window would give."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, sliding_window=None).eval()
    with torch.no_grad():
        return model(torch.load(source / "tokens.pt")).logits


def write_layout(source: Path, target: Path, layout: Target) -> None:
    """Convert to mcore by the command."""
    named = {name: value for name, value in asdict(layout).items() if value is not None}
    flags = [text for name, value in named.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert convert.main([str(source), str(target), "--format", "mcore", *flags]) == 0


def logits(checkpoints: Iterable[tuple[Path, Path]], timeout: float) -> list[torch.Tensor | str]:
    """Megatron-Core's logits of each (checkpoint, tokens), or what it raised."""
    cases = [{"root": str(root), "tokens": str(tokens), "out": f"{root}.logits"} for root, tokens in checkpoints]
    file = Path(f"{cases[0]['root']}.cases.json")
    file.write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, READER, file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return [
        error.read_text() if (error := Path(f"{case['out']}.error")).exists() else torch.load(case["out"])
        for case in cases
    ]


def phrase(layout: Target) -> str:
    """A layout in few words."""
    words = [f"{name} {value}" for name, value in asdict(layout).items() if isinstance(value, int) and value > 1]
    words += ["etp 1"] if layout.etp == 1 else []
    return ", ".join(words + (["first 1"] if layout.first_stage_layers == 1 else [])) or "one rank"
