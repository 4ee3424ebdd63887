"""Memory of a process and its descendants, from Linux's /proc."""

from collections import defaultdict
from pathlib import Path

COUNTED = ("RssAnon:", "RssShmem:")  # RssFile would count mapped checkpoint files, which the kernel can drop


def tree_memory(pid: int, proc: Path = Path("/proc")) -> int:
    """Bytes of anonymous and shared memory held by `pid` and all below it; 0 where there is no /proc."""
    parents, sizes = {}, defaultdict(int)
    for status in proc.glob("[0-9]*/status"):
        try:
            lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # the process ended meanwhile
            continue
        here = int(status.parent.name)
        for name, _, value in (line.partition("\t") for line in lines):
            if name == "PPid:":
                parents[here] = int(value)
            elif name in COUNTED:
                sizes[here] += int(value.split()[0]) * 1024
    return sum(size for process, size in sizes.items() if _descends(process, pid, parents))


def _descends(process: int, ancestor: int, parents: dict[int, int]) -> bool:
    while process and process != ancestor:
        process = parents.get(process, 0)
    return process == ancestor
