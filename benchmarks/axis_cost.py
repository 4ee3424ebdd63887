"""What each parallel axis costs on two ranks of this machine, beside the ideal of half of one process's time.

    python3 benchmarks/axis_cost.py [--axis tp dp …] [--rounds 5] [--tiny]

One process and the two ranks take turns over the same global batch, weights and optimizer, float32, one thread each.
The ratio is (time of two ranks) / (time of one process / 2): 1 is ideal. A pipeline of 2 stages and 8 micro-batches
stands still for a ninth of its time, so that its ideal is 1.13. The vocabulary is small, so that the output layer is
about as heavy beside the layers as in a 7B model.
"""

import argparse
import datetime
import platform
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from steps import our_step, run_config, taking_turns

from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.parallel.grid import resolve_grid
from megatron_patch.parallel.mesh import build_mesh, single_process
from megatron_patch.weights.load import RandomWeights

SAMPLES, RANKS = 8, 2
DENSE = {
    "num_layers": 4,
    "hidden_size": 512,
    "ffn_hidden_size": 1792,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "window_size": 512,
}
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 896}
TINY = {"hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 8, "vocab_size": 512}
AXES = {
    "dp": {},
    "dp replicated": {"use_distributed_optimizer": False},
    "tp": {"tensor_model_parallel_size": 2},
    "tp sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp": {"pipeline_model_parallel_size": 2},
    "pp vp": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    "cp": {"context_parallel_size": 2},
    "ep": {"expert_model_parallel_size": 2},
    "tp sp experts": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


def main() -> None:
    """One line per axis."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axis", choices=AXES, nargs="+", default=list(AXES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    options = parser.parse_args()
    length = 64 if options.tiny else 1024
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}; {SAMPLES} samples of "
        f"{length} tokens in micro-batches of 1, {RANKS} ranks of one thread, median of {options.rounds}"
    )
    for axis in options.axis:
        one, two = measured(run_of(axis, length, options.tiny), options.rounds)
        print(
            f"{axis:14} one process {one * 1e3:7.0f} ms, two ranks {two * 1e3:7.0f} ms: {two / (one / RANKS):4.2f} × "
            f"the ideal {one / RANKS * 1e3:.0f} ms",
            flush=True,
        )


def run_of(axis: str, length: int, is_tiny: bool) -> RunConfig:
    """The run that spreads a model over two ranks by `axis`."""
    has_experts = axis.startswith("ep") or axis.endswith("experts")
    config = ModelConfig(**DENSE | (EXPERTS if has_experts else {}) | (TINY if is_tiny else {}))
    return run_config(
        "mixtral" if has_experts else "mistral",
        config,
        length=length,
        samples=SAMPLES,
        micro_batch=1,
        parallel=ParallelConfig(**AXES[axis]),
    )


def measured(run: RunConfig, rounds: int) -> tuple[float, float]:
    """Median seconds of a step in one process, and on two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank_main, (run, rounds, folder), nprocs=RANKS)
        return torch.load(Path(folder, "seconds"))


def rank_main(rank: int, run: RunConfig, rounds: int, folder: str) -> None:
    """Rank 0 takes turns with both ranks; it writes what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    parallel = run.parallel
    mesh = build_mesh(
        resolve_grid(parallel, RANKS),
        torch.device("cpu"),
        sharded=parallel.use_distributed_optimizer,
        sequence_parallel=parallel.sequence_parallel,
        timeout_minutes=10.0,
    )
    alone = run_config(
        run.family, run.model, length=run.data.seq_length, samples=SAMPLES, micro_batch=run.micro_batch_size
    )
    source = RandomWeights(run.model, manifest(ALL[run.family], run.model), seed=0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, run.model.vocab_size, (SAMPLES, run.data.seq_length + 1), generator=generator)
    steps = {
        "one": our_step(alone, source, tokens, single_process()) if rank == 0 else lambda: 0.0,
        "two": our_step(run, source, tokens, mesh),
    }
    seconds = taking_turns(steps, rounds, wait=dist.barrier)
    if rank == 0:
        torch.save((seconds["one"], seconds["two"]), Path(folder, "seconds"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
