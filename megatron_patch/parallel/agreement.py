"""What ranks decide and do together on the host: results of all ranks, or the first rank's error on every one."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megatron_patch.parallel.mesh import Mesh

T = TypeVar("T")

# One that has died is noticed at once, and one that hangs by its `Progress`: however long a slow one takes is well.
LONGEST_WAIT = timedelta(days=30)


def host_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """All ranks, over gloo, in a group that no other collective uses; None for a single process.

    A thread may use it while others communicate. Every rank calls this at the same point.
    """
    return dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if mesh.world.size > 1 else None


def together(function: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """What `function` returns on every rank, in order; the error of the first rank that has one is raised on all."""
    result: T | Exception
    try:
        result = function()
    except Exception as error:  # the others wait for whatever becomes of it
        result = error
    results = [result]
    if group is not None:
        results = [None] * dist.get_world_size(group)
        dist.all_gather_object(results, result, group=group)
    for found in results:
        if isinstance(found, Exception):
            raise found
    return results
