"""The plan's estimate of a rank's memory beside what CPU ranks really held: `python3 benchmarks/memory_estimate.py`.

    python3 benchmarks/memory_estimate.py [--case dense …] [--list]

Each case takes the trainer's own steps from random weights in float32, and a validation; where it says so it is the
whole loop, with a checkpoint at the end. Measured is the most anonymous memory (RssAnon + RssShmem, read every other
millisecond) of a rank, less what it held once its process groups stood. No constant of the plan was fitted to these
figures.
"""

import argparse
import dataclasses
import datetime
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_patch.config.checkpoint import CheckpointConfig
from megatron_patch.config.checks import check
from megatron_patch.config.data import DataConfig
from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest, parameter_count
from megatron_patch.parallel.grid import Grid, resolve_grid
from megatron_patch.plan.memory import memory

if TYPE_CHECKING:
    from megatron_patch.parallel.mesh import Mesh

INTERVAL = 0.002  # seconds between two looks at a rank
LONGEST = 900  # seconds of a case
STEPS, LENGTH = 3, 512
DENSE = ModelConfig(
    num_layers=12,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=32000,
    max_position_embeddings=4096,
)
EXPERTS = dataclasses.replace(
    DENSE, num_layers=4, ffn_hidden_size=2048, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=2048
)
HALF_DENSE = dataclasses.replace(DENSE, num_layers=4)
HALF_EXPERTS = dataclasses.replace(EXPERTS, num_layers=2, vocab_size=16000)


@dataclass(frozen=True)
class Case:
    """A model on a layout."""

    family: str
    model: ModelConfig
    world: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    micro_batches: int = 1
    length: int = LENGTH
    is_saved: bool = False

    @property
    def grid(self) -> Grid:
        return resolve_grid(self.parallel, self.world)


TP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
REPLICATED = ParallelConfig(use_distributed_optimizer=False)
STAGES = ParallelConfig(pipeline_model_parallel_size=2)
SPREAD_EXPERTS = ParallelConfig(expert_model_parallel_size=2)
SELECTIVE, FULL = (MemoryConfig(recompute_granularity=kind) for kind in ("selective", "full"))
CASES = {
    "dense": Case("mistral", DENSE),
    "dense, AC=sel": Case("mistral", DENSE, memory=SELECTIVE),
    "dense, AC=full": Case("mistral", DENSE, memory=FULL),
    "dense, long": Case("mistral", dataclasses.replace(DENSE, num_layers=10), length=2048),
    "dense, 2 micro-batches": Case("mistral", DENSE, micro_batches=2),
    "dense, TP2 SP": Case("mistral", DENSE, 2, TP),
    "dense, PP2": Case("mistral", DENSE, 2, STAGES, micro_batches=2),
    "half dense, DP2": Case("mistral", HALF_DENSE, 2),
    "half dense, DP2, saved": Case("mistral", HALF_DENSE, 2, is_saved=True),
    "half dense, saved": Case("mistral", HALF_DENSE, is_saved=True),
    "half dense, DP2, 2 micro-batches": Case("mistral", HALF_DENSE, 2, micro_batches=2),
    "half dense, DP2 DO=false": Case("mistral", HALF_DENSE, 2, REPLICATED),
    "experts": Case("mixtral", EXPERTS),
    "experts, AC=full": Case("mixtral", EXPERTS, memory=FULL),
    "experts, TP2 SP": Case("mixtral", EXPERTS, 2, TP),
    "half experts, DP2 EP2": Case("mixtral", HALF_EXPERTS, 2, SPREAD_EXPERTS),
}


def main() -> None:
    """One table, a line per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--phases", action="store_true", help="print what each rank held after each step")
    options = parser.parse_args()
    print(f"{datetime.date.today()}, Python {sys.version.split()[0]}, {os.cpu_count()} cores; GB are 10^9 bytes\n")
    print(
        "| case | ranks | weights GB | estimated GB | measured GB | off | fullest moment |",
        "|---|---|---|---|---|---|---|",
        sep="\n",
    )
    worst = 0.0
    for name in options.case:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            run = run_of(case, Path(folder))
            entries = manifest(ALL[case.family], case.model)
            parts = memory(run, entries, case.grid, on_cpu=True)
            measured = max(measure(run, case.world, folder))
        off = parts["total"] / measured - 1
        worst = max(worst, abs(off))
        weights = 4 * parameter_count(ALL[case.family], case.model)
        moment = parts["fullest"]
        figures = f"{weights / 1e9:.2f} | {parts['total'] / 1e9:.2f} | {measured / 1e9:.2f} | {off:+.1%}"
        print(f"| {name} | {case.world} | {figures} | {moment} |", flush=True)
        if options.phases:
            print({k: round(v / 1e6) if isinstance(v, int) else v for k, v in parts.items()}, flush=True)
    print(f"\nfarthest off: {worst:.1%}")


def run_of(case: Case, folder: Path) -> RunConfig:
    """Three steps of the case, its data and its output in `folder`."""
    paths, dp = (str(folder / "data"),), case.grid.dp
    kind = "dcp" if case.is_saved else "torch"  # the plan of the latter has no copy of a checkpoint
    run = RunConfig(
        model=case.model,
        parallel=case.parallel,
        data=DataConfig(
            train_data_path=paths,
            valid_data_path=paths,
            split="80,20,0",
            seq_length=case.length,
            max_padding_length=case.length,
            tokenizer_model=str(folder),
        ),
        optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-5, lr_decay_iters=STEPS),
        memory=case.memory,
        checkpoint=CheckpointConfig(save=str(folder / "out"), save_interval=STEPS, ckpt_format=kind),
        family=case.family,
        train_iters=STEPS,
        micro_batch_size=1,
        global_batch_size=case.micro_batches * dp,
        precision="fp32",
        eval_iters=1,
    )
    check(run, case.world)
    return run


def write_inputs(run: RunConfig) -> None:
    """Random tokens, and a tokenizer of as many words."""
    import numpy as np
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from megatron_patch.data.indexed import IndexedDatasetBuilder

    length, size = run.data.seq_length + 1, run.model.vocab_size
    tokens = np.random.default_rng(0).integers(0, size, (50, length))
    with IndexedDatasetBuilder(run.data.train_data_path[0], "uint16") as builder:
        builder.add(tokens.ravel(), [length] * 50, [1] * 50)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")
    tokenizer.save_pretrained(run.data.tokenizer_model)


def measure(run: RunConfig, world: int, folder: str) -> list[int]:
    """Bytes that each rank held at most above what it held once its groups stood."""
    context = multiprocessing.get_context("spawn")
    if run.checkpoint.ckpt_format == "dcp":
        writer = context.Process(target=write_inputs, args=(run,))
        writer.start()
        writer.join()
    pipes = [context.Pipe() for _ in range(world)]
    ranks = [
        context.Process(target=rank_of_run, args=(run, rank, world, folder, pipe[1])) for rank, pipe in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    before = [pipe[0].recv() for pipe in pipes]  # once the groups of a rank stand
    most, deadline = list(before), time.monotonic() + LONGEST
    while any(process.is_alive() for process in ranks):
        most = [max(held, anonymous(process.pid)) for held, process in zip(most, ranks, strict=True)]
        if any(process.exitcode for process in ranks) or time.monotonic() > deadline:
            for process in ranks:
                process.kill()
            raise RuntimeError(f"ranks failed, or took longer than {LONGEST} s: {[rank.exitcode for rank in ranks]}")
        time.sleep(INTERVAL)
    return [held - start for held, start in zip(most, before, strict=True)]


def anonymous(process: int | str) -> int:
    """Bytes of a process's own memory and of what it shares without a file; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def rank_of_run(run: RunConfig, rank: int, world: int, folder: str, pipe: Connection) -> None:
    """One rank: it tells what it holds before it trains."""
    import torch
    import torch.distributed as dist

    from megatron_patch.parallel.mesh import build_mesh
    from megatron_patch.train.loop import train

    torch.set_num_threads(1)
    minutes = timedelta(minutes=30)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=minutes
    )
    mesh = build_mesh(
        resolve_grid(run.parallel, world),
        torch.device("cpu"),
        sharded=run.parallel.use_distributed_optimizer,
        sequence_parallel=run.parallel.sequence_parallel,
        timeout_minutes=30.0,
    )
    dist.barrier()
    pipe.send(anonymous("self"))
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # the log of training
        train(run, mesh) if run.checkpoint.ckpt_format == "dcp" else train_steps(run, mesh)
    dist.destroy_process_group()


def train_steps(run: RunConfig, mesh: "Mesh") -> None:
    """The trainer's own steps and validation alone, on random tokens."""
    import torch

    from megatron_patch.data.batches import Batch
    from megatron_patch.model.build import build_model
    from megatron_patch.train.loss_scale import LossScale
    from megatron_patch.train.optimizer import build_optimizer
    from megatron_patch.train.passes import build_passes
    from megatron_patch.train.step import evaluate, train_step
    from megatron_patch.weights.load import RandomWeights, load_weights

    entries = manifest(ALL[run.family], run.model)
    chunks = build_model(run.model, run.parallel, run.precision, mesh, run.memory)
    load_weights(chunks, entries, RandomWeights(run.model, entries, seed=1), mesh)
    optimizer, passes = build_optimizer(run.optimizer, chunks), build_passes(chunks, mesh, run.precision)
    samples = run.global_batch_size // mesh.dp.size
    tokens = torch.randint(run.model.vocab_size, (samples, run.data.seq_length + 1))
    mask = torch.ones(1, run.data.seq_length)
    batches = [Batch(row[:, :-1].contiguous(), row[:, 1:].contiguous(), mask) for row in tokens.split(1)]
    for _ in range(STEPS - 1):
        train_step(run, passes, optimizer, entries, batches, mesh, LossScale.of(run.precision))
    evaluate(passes, [batches], mesh)


if __name__ == "__main__":
    main()
