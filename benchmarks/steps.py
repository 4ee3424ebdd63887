"""Training steps to be timed: the trainer's own and transformers', from the same weights, and how they take turns."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_patch.config.checkpoint import CheckpointConfig
from megatron_patch.config.data import DataConfig
from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.data.batches import Batch
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.model.build import DTYPES, build_model
from megatron_patch.model.compilation import compile_layers, is_compiled
from megatron_patch.model.kernels import resolve_kernel, using
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.train.loss_scale import LossScale
from megatron_patch.train.optimizer import build_optimizer
from megatron_patch.train.passes import build_passes
from megatron_patch.train.step import train_step
from megatron_patch.weights.load import StartWeights, load_weights

Step = Callable[[], float]  # trains once and returns the loss, or this rank's part of it
OPTIMIZER = OptimizerConfig(lr=1e-4, min_lr=1e-5, lr_decay_iters=100)


def run_config(
    family: str,
    config: ModelConfig,
    *,
    length: int,
    samples: int,
    micro_batch: int,
    parallel: ParallelConfig | None = None,
    precision: str = "fp32",
) -> RunConfig:
    """A run of `samples` samples of `length` tokens a step, in micro-batches. Its files are never opened."""
    return RunConfig(
        model=config,
        parallel=parallel or ParallelConfig(),
        data=DataConfig(
            train_data_path=("none",), valid_data_path=("none",), seq_length=length, max_padding_length=length
        ),
        optimizer=OPTIMIZER,
        memory=MemoryConfig(),
        checkpoint=CheckpointConfig(save="none", save_interval=1),
        family=family,
        train_iters=100,
        micro_batch_size=micro_batch,
        global_batch_size=samples,
        precision=precision,
    )


def our_step(run: RunConfig, source: StartWeights, tokens: Tensor, mesh: Mesh) -> Step:
    """The trainer's step on this rank's share of `tokens` [samples, length + 1]."""
    entries = manifest(ALL[run.family], run.model)
    chunks = build_model(run.model, run.parallel, run.precision, mesh, run.memory)
    if is_compiled(run.torch_compile, mesh.device):
        compile_layers(chunks)
    load_weights(chunks, entries, source, mesh)
    optimizer, passes = build_optimizer(run.optimizer, chunks), build_passes(chunks, mesh, run.precision)
    kernel = resolve_kernel(run.model, mesh, DTYPES[run.precision], fastest=run.use_flash_attn)
    scale, size = LossScale.of(run.precision), run.micro_batch_size
    shares = tokens.split(size)[mesh.dp.rank :: mesh.dp.size]
    ones = torch.ones(size, tokens.shape[1] - 1)
    batches = [Batch(share[:, :-1].contiguous(), share[:, 1:].contiguous(), ones) for share in shares]

    def step() -> float:
        with using(kernel, chunks):
            return train_step(run, passes, optimizer, entries, batches, mesh, scale).loss

    return step


def peer_step(peer: PreTrainedModel, tokens: Tensor) -> Step:
    """A step of all `tokens` [samples, length + 1] at once, as transformers' users write it."""
    betas = (OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2)
    optimizer = torch.optim.AdamW(
        peer.parameters(), lr=OPTIMIZER.lr, betas=betas, weight_decay=OPTIMIZER.weight_decay, fused=True
    )
    inputs, labels = (part.contiguous().to(peer.device) for part in (tokens[:, :-1], tokens[:, 1:]))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = peer(input_ids=inputs, labels=inputs, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        return loss.item()

    return step


def taking_turns(steps: Mapping[str, Step], rounds: int, wait: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Median seconds of each step over `rounds`, after one that warms up; the machine's drift hits all of them.

    `wait` returns once what was asked of the device, or of other ranks, is done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            wait()
            begin = time.perf_counter()
            step()
            wait()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
