"""One rank of a training run: `torchrun … -m megatron_patch.train --flags`."""

import os
import sys

import torch.distributed as dist

from megatron_patch.config.checks import check
from megatron_patch.config.flags import from_flags
from megatron_patch.parallel.grid import resolve_grid
from megatron_patch.parallel.mesh import build_mesh, start_process_group
from megatron_patch.train.loop import train


def main(argv: list[str]) -> int:
    """Join the other ranks, train, leave. Returns the exit code; an error of the user's is one sentence."""
    run = from_flags(argv)
    parallel = run.parallel
    try:
        check(run, int(os.environ["WORLD_SIZE"]))
        grid = resolve_grid(parallel, int(os.environ["WORLD_SIZE"]))
        device = start_process_group(parallel.distributed_timeout_minutes)
        mesh = build_mesh(
            grid,
            device,
            sharded=parallel.use_distributed_optimizer,
            sequence_parallel=parallel.sequence_parallel,
            timeout_minutes=parallel.distributed_timeout_minutes,
        )
        train(run, mesh)
        dist.destroy_process_group()
    except (ValueError, OSError, MemoryError, OverflowError) as error:
        print(f"megatron_patch.train: rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(f"megatron_patch.train: rank {os.environ['RANK']}: interrupted", file=sys.stderr, flush=True)
        return 130  # what a shell reports for a command that Ctrl-C ended
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
