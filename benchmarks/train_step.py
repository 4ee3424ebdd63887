"""One training step on the CPU beside transformers': same weights, same batch, same optimizer, one process, float32.

    python3 benchmarks/train_step.py [--family mistral] [--steps 8] [--threads 2] [--experts eager]

Steps alternate, so that the machine's drift hits both. Prints medians and the ratio transformers / ours: above 1, ours
is faster. `--experts` chooses transformers' way of computing experts: `eager` loops over them, as its users have it on
a CPU; `grouped_mm` and `batched_mm` are its faster ones.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.data.batches import Batch
from megatron_patch.families import ALL
from megatron_patch.families.family import Family
from megatron_patch.families.manifest import manifest
from megatron_patch.families.resolve import read_config
from megatron_patch.model.build import build_model
from megatron_patch.parallel.mesh import single_process
from megatron_patch.train.optimizer import build_optimizer, clip_gradients
from megatron_patch.train.passes import OneStage
from megatron_patch.train.step import backward
from megatron_patch.train.weights import load_weights

BATCH, LENGTH = 4, 512
DENSE = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
FINE_GRAINED = DENSE | {"num_key_value_heads": 8, "moe_intermediate_size": 256, "num_experts_per_tok": 4}
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e4}
LLAMA3 = STRETCHED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = STRETCHED | {"rope_type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707}
SHAPES = {  # the proportions of published models, small
    "mistral": MistralConfig(**DENSE, sliding_window=4096),
    "llama": LlamaConfig(**DENSE, rope_parameters=LLAMA3),
    "qwen1_5": Qwen2Config(**DENSE | {"num_key_value_heads": 8}),
    "mixtral": MixtralConfig(**DENSE, num_local_experts=8, num_experts_per_tok=2),
    "qwen1_5_moe": Qwen2MoeConfig(**FINE_GRAINED, num_experts=32, shared_expert_intermediate_size=1024),
    "deepseek_v2": DeepseekV2Config(
        **FINE_GRAINED,
        n_routed_experts=32,
        n_shared_experts=2,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        rope_parameters=YARN,
    ),
}
OPTIMIZER = OptimizerConfig(lr=1e-4, min_lr=1e-5, lr_decay_iters=100)


def peer_step(peer: PreTrainedModel, tokens: torch.Tensor) -> Callable[[], float]:
    """A step as transformers' users write it."""
    betas = (OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2)
    optimizer = torch.optim.AdamW(
        peer.parameters(), lr=OPTIMIZER.lr, betas=betas, weight_decay=OPTIMIZER.weight_decay, fused=True
    )
    inputs = tokens[:, :-1]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = peer(input_ids=inputs, labels=inputs, use_cache=False).loss  # shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        return loss.item()

    return step


def our_step(directory: Path, family: Family, tokens: torch.Tensor) -> Callable[[], float]:
    """The training loop's step, from the peer's weights."""
    mesh = single_process()
    config = family.config(read_config(directory))
    entries = manifest(family, config)
    chunks = build_model(config, ParallelConfig(), "fp32", mesh)
    load_weights(chunks, entries, open_checkpoint(directory, family, config), mesh)
    optimizer, passes = build_optimizer(OPTIMIZER, chunks), OneStage(chunks, mesh)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(BATCH, LENGTH))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = backward(passes, [batch], mesh)
        clip_gradients(chunks, entries, mesh, limit=OPTIMIZER.clip_grad, sharded=True)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    """Alternate the two and print their medians and ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=SHAPES, default="mistral")
    parser.add_argument("--experts", choices=("eager", "grouped_mm", "batched_mm"), default="eager")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokens = torch.randint(0, DENSE["vocab_size"], (BATCH, LENGTH + 1))
    shape = SHAPES[options.family]
    peer = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa", experts_implementation=options.experts)
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        steps = {
            "transformers": peer_step(peer, tokens),
            "ours": our_step(Path(directory), ALL[options.family], tokens),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(options.steps + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                loss = step()
                if number:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - start)
                else:
                    print(f"{name:13s} first loss {loss:.4f}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:13s} {median * 1e3:8.0f} ms a step, {BATCH * LENGTH / median:7.0f} tokens/s")
    print(f"ratio transformers / ours: {medians['transformers'] / medians['ours']:.2f}")


if __name__ == "__main__":
    main()
