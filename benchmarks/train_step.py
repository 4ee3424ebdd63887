"""One training step on the CPU beside transformers': same weights, same batch, same optimizer, one process, float32.

    python3 benchmarks/train_step.py [--steps 8] [--threads 2]

Steps alternate, so that the machine's drift hits both. Prints medians and the ratio transformers / ours: above 1, ours
is faster.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.data.batches import Batch
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.families.resolve import read_config
from megatron_patch.model.build import build_model
from megatron_patch.parallel.mesh import single_process
from megatron_patch.train.optimizer import build_optimizer, clip_gradients
from megatron_patch.train.step import backward
from megatron_patch.train.weights import load_weights

BATCH, LENGTH = 4, 512
SHAPE = MistralConfig(
    num_hidden_layers=4,
    hidden_size=512,
    intermediate_size=1792,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=32000,
    max_position_embeddings=4096,
    sliding_window=4096,
    attn_implementation="sdpa",
)
OPTIMIZER = OptimizerConfig(lr=1e-4, min_lr=1e-5, lr_decay_iters=100)


def peer_step(peer: MistralForCausalLM, tokens: torch.Tensor) -> Callable[[], float]:
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


def our_step(directory: Path, tokens: torch.Tensor) -> Callable[[], float]:
    """The training loop's step, from the peer's weights."""
    mesh, family = single_process(), ALL["mistral"]
    config = family.config(read_config(directory))
    entries = manifest(family, config)
    model = build_model(config, ParallelConfig(), "fp32", mesh)
    load_weights(model, entries, open_checkpoint(directory, family, config), mesh.tp)
    optimizer = build_optimizer(OPTIMIZER, model)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(BATCH, LENGTH))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = backward(model, [batch], mesh)
        clip_gradients(model, entries, mesh, limit=OPTIMIZER.clip_grad, sharded=True)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    """Alternate the two and print their medians and ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokens = torch.randint(0, SHAPE.vocab_size, (BATCH, LENGTH + 1))
    peer = MistralForCausalLM(SHAPE)
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        steps = {"transformers": peer_step(peer, tokens), "ours": our_step(Path(directory), tokens)}
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
