"""The output directory as every node sees it."""

import secrets
import socket
import time
from pathlib import Path

import torch.distributed as dist

from megatron_patch.parallel.progress import Progress

PATIENCE_SECONDS = 10.0  # a network file system may show another machine's new file late
POLL_SECONDS = 0.1


def check_shared(directory: Path, progress: Progress) -> None:
    """Raise ValueError on every rank unless all of them see what rank 0 writes in `directory`, which it has made."""
    if progress.group is None:
        return
    is_first, doing = dist.get_rank(progress.group) == 0, "looking at the output directory"
    token = directory / progress.together(doing, lambda: f".shared_{secrets.token_hex(8)}")[0]
    try:
        progress.together(doing, lambda: token.touch() if is_first else None)
        progress.together(doing, lambda: _look(token))
    finally:
        if is_first:
            token.unlink(missing_ok=True)


def _look(token: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not token.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{token.parent} on {socket.gethostname()} is not the directory that rank 0 writes to: put "
                "OUTPUT_BASEPATH on a file system that all nodes share"
            )
        time.sleep(POLL_SECONDS)
