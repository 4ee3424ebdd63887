"""Whether ranks on this machine can talk: two processes that add up a tensor, for each library there is."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_patch.doctor.finding import Finding

SECONDS = 60
RANK = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
backend, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
if backend != "gloo":
    torch.cuda.set_device(device)
rendezvous = f"file://{folder}/{backend}"
dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=30))
ones = torch.ones(1024, device=device)
dist.all_reduce(ones)
assert ones.sum().item() == 2048, "the sum is wrong"
dist.destroy_process_group()
"""


def collectives() -> Iterator[Finding]:
    """An all-reduce over gloo, and over nccl where there are two GPUs."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("collectives", "torch.distributed", "not in this build of torch", "only one rank can run")
        return
    yield _tried("gloo", "several CPU ranks, and what ranks of GPUs agree on through the host, do not work")
    if not torch.cuda.is_available():
        return
    if not dist.is_nccl_available():
        yield Finding("collectives", "nccl", "not in this build of torch", "only one GPU can be used")
    elif torch.cuda.device_count() > 1:
        yield _tried("nccl", "only one GPU can be used; NCCL_DEBUG=INFO says more")
    else:
        yield Finding("collectives", "nccl", "not tried: there is one GPU")


def _tried(backend: str, cost: str) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        failure = all_reduce(backend, Path(folder))
    return Finding("collectives", backend, failure or "two ranks added up a tensor", cost if failure else "")


def all_reduce(backend: str, folder: Path) -> str | None:
    """Two ranks add up a tensor. Returns what went wrong, if anything did."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, backend, str(folder), str(rank)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    failures = []
    try:
        for number, rank in enumerate(ranks):
            _, said = rank.communicate(timeout=SECONDS)
            if rank.returncode:
                failures.append(f"rank {number}: {(said.strip().splitlines() or ['no word'])[-1]}")
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS} s"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return "; ".join(failures) or None
