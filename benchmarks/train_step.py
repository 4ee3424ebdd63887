"""A training step on the CPU beside transformers', family by family: the same weights, batch and optimizer, float32.

    python3 benchmarks/train_step.py [--family mistral …] [--rounds 8] [--threads 2] [--tiny]

One process each, which take turns. Where there are experts, transformers is timed twice: with the loop over them that
its users have on a CPU (eager), and with its fastest (grouped_mm). A ratio above 1 says that ours is faster.
"""

import argparse
import dataclasses
import datetime
import platform
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from steps import Step, our_step, peer_step, run_config, taking_turns

from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.families import ALL
from megatron_patch.families.resolve import read_config
from megatron_patch.parallel.mesh import single_process

DENSE = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
FINE_GRAINED = {
    "num_key_value_heads": 8,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 4,
}
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e4}
LLAMA3 = STRETCHED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = STRETCHED | {"rope_type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707}
LATENT = {
    "n_routed_experts": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "rope_parameters": YARN,
}
SHAPES = {  # the proportions of published models, small
    "mistral": (MistralConfig, {"sliding_window": 4096}),
    "llama": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "qwen1_5": (Qwen2Config, {"num_key_value_heads": 8}),
    "mixtral": (MixtralConfig, {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen1_5_moe": (Qwen2MoeConfig, FINE_GRAINED | {"num_experts": 32, "shared_expert_intermediate_size": 1024}),
    "deepseek_v2": (DeepseekV2Config, FINE_GRAINED | LATENT),
}
WITH_EXPERTS = ("mixtral", "qwen1_5_moe", "deepseek_v2")
BATCH = 4


def main() -> None:
    """One line per family and way of transformers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    length = 64 if options.tiny else 512
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {options.threads} threads; {BATCH} samples of {length} tokens, "
        f"vocabulary {DENSE['vocab_size'] if not options.tiny else TINY['vocab_size']}, median of {options.rounds}"
    )
    for family in options.family:
        kind, differing = SHAPES[family]
        shape = kind(**DENSE | (TINY if options.tiny else {}) | differing)
        tokens = torch.randint(0, shape.vocab_size, (BATCH, length + 1), generator=torch.Generator().manual_seed(0))
        steps = side_by_side(family, shape, tokens)
        medians = taking_turns(steps, options.rounds)
        ours = medians.pop("ours")
        print(f"{family:12} ours {ours * 1e3:7.0f} ms {BATCH * length / ours:7.0f} tokens/s", end="")
        print("".join(f" | {name} {taken * 1e3:7.0f} ms, {taken / ours:4.2f} ×" for name, taken in medians.items()))


def side_by_side(family: str, shape: PretrainedConfig, tokens: torch.Tensor) -> dict[str, Step]:
    """Ours and transformers' steps, from the same weights. Raises RuntimeError unless their first losses agree."""
    torch.manual_seed(0)
    mesh = single_process()
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(shape).save_pretrained(directory)
        config = ALL[family].config(read_config(Path(directory)))
        config = dataclasses.replace(config, moe_router_load_balancing_type="none")  # as transformers, unless asked
        run = run_config(family, config, length=tokens.shape[1] - 1, samples=len(tokens), micro_batch=len(tokens))
        steps = {"ours": our_step(run, open_checkpoint(directory, ALL[family], config), tokens, mesh)}
        for experts in ("eager", "grouped_mm") if family in WITH_EXPERTS else ("",):
            chosen = {"experts_implementation": experts} if experts else {}
            peer = AutoModelForCausalLM.from_pretrained(
                directory, attn_implementation="sdpa", dtype=torch.float32, **chosen
            )
            steps[f"transformers {experts}".strip()] = peer_step(peer.train(), tokens)
        losses = {name: step() for name, step in steps.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise RuntimeError(f"{family}: these steps do not train the same model: their first losses are {losses}")
    return steps


if __name__ == "__main__":
    main()
