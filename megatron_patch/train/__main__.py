"""One rank of a training run: `python -m megatron_patch.train.agent … -m megatron_patch.train --flags` starts them."""

import faulthandler
import os
import sys
import threading
import traceback

import torch.distributed as dist

from megatron_patch.config.checks import check
from megatron_patch.config.flags import from_flags
from megatron_patch.config.run import RunConfig
from megatron_patch.parallel.grid import Grid, resolve_grid
from megatron_patch.parallel.mesh import build_mesh, start_process_group
from megatron_patch.parallel.progress import HungError
from megatron_patch.train.loop import train
from megatron_patch.train.out_of_memory import is_out_of_memory, out_of_memory
from megatron_patch.train.ranks import WHERE
from megatron_patch.train.report import PIPE, Report, first_words, write_report
from megatron_patch.train.signals import end_with_agent

# What c10d's backends say when another rank is gone or silent; only some of these errors have a type of their own.
LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Timed out", "Broken pipe", "NCCL", "HCCL")


def main(argv: list[str]) -> int:
    """Join the other ranks, train, leave. Returns the exit code; an error of the user's is one sentence."""
    end_with_agent()
    if PIPE in os.environ:
        faulthandler.register(WHERE, file=int(os.environ[PIPE]), all_threads=False)
    run, world = from_flags(argv), int(os.environ["WORLD_SIZE"])
    try:
        check(run, world)
        _train(run, resolve_grid(run.parallel, world))
    except KeyboardInterrupt:
        return _failed(Report("interrupted"), 130)  # what a shell reports for a command that Ctrl-C ended
    except (ValueError, OSError, OverflowError, HungError) as error:
        return _failed(Report(str(error)))
    except Exception as error:
        return _failed(_explained(error, run, world))
    return 0


def _train(run: RunConfig, grid: Grid) -> None:
    parallel = run.parallel
    device = start_process_group(parallel.distributed_timeout_minutes)
    mesh = build_mesh(
        grid,
        device,
        sharded=parallel.use_distributed_optimizer,
        sequence_parallel=parallel.sequence_parallel,
        timeout_minutes=parallel.distributed_timeout_minutes,
    )
    train(run, mesh)
    _leave(parallel.distributed_timeout_minutes)


def _leave(timeout_minutes: float) -> None:
    """Close the process groups; where that hangs, end the rank all the same: all that it made is on the disk."""
    end = threading.Timer(60 * timeout_minutes, os._exit, (0,))
    end.daemon = True
    end.start()
    dist.destroy_process_group()
    end.cancel()


def _explained(error: Exception, run: RunConfig, world: int) -> Report:
    """What no rule foresaw: memory, another rank, or a defect of ours, which alone needs its traceback."""
    if is_out_of_memory(error):
        return Report(out_of_memory(error, run, resolve_grid(run.parallel, world)))
    words = first_words(error)
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in words for w in LOST_CONTACT)):
        minutes = run.parallel.distributed_timeout_minutes
        return Report(f"lost contact with another rank, having waited at most {minutes:g} minutes: {words}", True)
    return Report(f"{type(error).__name__}: {words}", traceback=traceback.format_exc())


def _failed(report: Report, status: int = 1) -> int:
    if not write_report(report):
        print(f"{report.traceback}megatron_patch.train: rank {os.environ['RANK']}: {report.text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the interpreter's own end would wait for communication that may never complete
