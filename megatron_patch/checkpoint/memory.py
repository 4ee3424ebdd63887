"""How much memory this process really takes: pages of its own, not those of files it has mapped."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

INTERVAL = 0.02  # seconds
_STATUS = Path("/proc/self/status")


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Watch RssAnon + RssShmem, in bytes, while the block runs; what is given returns the largest sum seen.

    Zero where the system does not tell (Linux does).
    """
    seen = [_resident()]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(INTERVAL):
            seen[0] = max(seen[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: seen[0]
    finally:
        is_over.set()
        watcher.join()
        seen[0] = max(seen[0], _resident())


def _resident() -> int:
    if not _STATUS.exists():
        return 0
    lines = (line.split() for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines())
    return sum(int(line[1]) * 1024 for line in lines if line[0] in ("RssAnon:", "RssShmem:"))
