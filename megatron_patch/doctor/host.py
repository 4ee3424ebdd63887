"""Memory, processor, disk, limits and clock of this machine, without torch."""

import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_patch.doctor.finding import Finding
from megatron_patch.plan.machine import host_memory
from megatron_patch.plan.table import in_units

LEAST_SHARED = 2**30  # bytes: below, the communication libraries of several ranks run out of it
LEAST_FREE, LEAST_SPEED = 10 * 2**30, 100 * 2**20  # bytes, bytes per second
LEAST_FILES = 4096
TRIAL = 64 * 2**20  # bytes that are written to see how fast a disk is
EARLIEST = 1_735_689_600  # the start of 2025: before this code was written


def host(root: Path = Path("/")) -> Iterator[Finding]:
    """Processor, memory, name and clock."""
    yield from _memory(root)
    yield from _names()
    yield _clock()


def _memory(root: Path) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("host", "processor", f"{cores} cores")
    available = host_memory(root)
    cost = "" if available else "whether a run fits in host memory is not known before it starts"
    yield Finding("host", "memory available", in_units(available), cost)
    shared = root / "dev/shm"
    if not shared.is_dir():
        yield Finding("host", "/dev/shm", "not there", "ranks on one machine exchange data over sockets, slowly")
        return
    size = shutil.disk_usage(shared).total
    cost = "ranks of NCCL or data workers may end with a bus error; start the container with --shm-size=8g"
    yield Finding("host", "/dev/shm", in_units(size), cost if size < LEAST_SHARED else "")


def disk(directory: Path) -> Iterator[Finding]:
    """What is free where a run would write, and how fast it takes 64 MiB."""
    free = shutil.disk_usage(directory).free
    cost = "a checkpoint of 1 billion parameters takes 12 GB with its optimizer: name another directory"
    yield Finding("disk", f"free in {directory}", in_units(free), cost if free < LEAST_FREE else "")
    if not os.access(directory, os.W_OK | os.X_OK):
        yield Finding("disk", "writing", "no permission", f"nothing can be written in {directory}")
        return
    if free < 2 * TRIAL:
        yield Finding("disk", "writing", "not tried: too little is free", "how fast the disk is remains unknown")
        return
    speed = write_speed(directory)
    cost = "checkpoints take longer to write than the steps between them may last; raise SAVE_INTERVAL"
    yield Finding("disk", "writing", f"{in_units(int(speed))}/s", cost if speed < LEAST_SPEED else "")


def write_speed(directory: Path) -> float:
    """Bytes per second of a file of 64 MiB that is on the disk when it ends, and removed again."""
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=directory) as file:
        begin = time.perf_counter()
        for _ in range(TRIAL // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return TRIAL / (time.perf_counter() - begin)


def limits(root: Path = Path("/")) -> Iterator[Finding]:
    """What this user's processes may have open and locked."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shown = "unlimited" if files == resource.RLIM_INFINITY else f"{files:,}"
    is_low = files != resource.RLIM_INFINITY and files < LEAST_FILES
    cost = "large worlds and checkpoints of many files may fail with 'too many open files'; ulimit -n 65536"
    yield Finding("limits", "open files", shown, cost if is_low else "")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    is_unlimited = locked == resource.RLIM_INFINITY
    cost = "InfiniBand and pinned memory may be refused; ulimit -l unlimited"
    has_fabric = (root / "dev/infiniband").is_dir()
    yield Finding(
        "limits",
        "locked memory",
        "unlimited" if is_unlimited else in_units(locked),
        "" if is_unlimited or not has_fabric else cost,
    )


def _names() -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        yield Finding("host", "own name", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        cost = "several nodes cannot find each other by name; MASTER_ADDR must be a number"
        yield Finding("host", "own name", f"{name} is not resolved", cost)


def _clock() -> Finding:
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    cost = "output directories and logs carry wrong dates, and downloads may be refused; set the clock"
    return Finding("host", "clock", shown, cost if now < EARLIEST else "")
