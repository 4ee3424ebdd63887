"""Run a function on several gloo ranks from inside pytest, so that a failing rank can never hang the suite.

Ranks start from a forkserver that has torch loaded: a plain fork after tokenizers or OpenMP threads can deadlock.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
# What a rank would import, once for all.
PRELOADED = ["torch._dynamo", "torch._inductor.config", "megatron_patch.train.pipeline", "rank_probes", "tiny_run"]


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returned on each rank. Raises with the traceback of the first rank that failed."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # a forkserver before Python 3.12 preloads from nowhere else
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=run_on_rank, args=(function, arguments, rank, world, folder))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        _wait(processes, folder)
        import torch  # after the ranks have started: the forkserver needs no torch of ours

        return [torch.load(Path(folder, f"result_{rank}"), weights_only=False) for rank in range(world)]


def _wait(processes: list[multiprocessing.Process], folder: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.01)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    failures = sorted(Path(folder).glob("failure_*"))
    if failures:
        raise AssertionError(f"{failures[0].name}:\n{failures[0].read_text()}")
    if late or any(process.exitcode for process in processes):
        codes = [process.exitcode for process in processes]
        raise AssertionError(f"ranks {late} did not finish within {TIMEOUT:.0f} s; exit codes {codes}")


def run_on_rank(function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world: int, folder: str) -> None:
    """What a rank's process does; it leaves its result, or its traceback, in `folder`."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT),
        )
        result = function(*arguments)
        torch.save(result, Path(folder, f"result_{rank}"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"failure_{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None
