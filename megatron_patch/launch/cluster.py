"""How many ranks, on which nodes, and the options of the agent that starts them."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_patch.launch.positional import UsageError
from megatron_patch.launch.values import count, whole

VISIBLE = {
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
    "davinci": ("ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES"),
    "kfd": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
}
LARGEST_PORT = 2**16 - 1
ALONE = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1")
KFD_NODES = "sys/class/kfd/kfd/topology/nodes"


class Cluster:
    """Ranks of a run: their number, how it was found, and the agent's options."""

    __slots__ = ("counted", "options", "ranks_per_node", "world")

    def __init__(self, nodes: int, ranks_per_node: int, counted: str, options: list[str]) -> None:
        self.ranks_per_node, self.world, self.counted = ranks_per_node, nodes * ranks_per_node, counted
        self.options = [*options, "--nproc-per-node", str(ranks_per_node)]


def one_node(environ: Mapping[str, str], smallest: int, root: Path = Path("/")) -> Cluster:
    """ENV=dsw: NPROC_PER_NODE ranks, else one per visible accelerator, else the `smallest` world that fits.

    The rendezvous address is a number: a machine that cannot resolve its own name starts too.
    """
    options = [*ALONE, "--nnodes", "1"]
    if environ.get("NPROC_PER_NODE"):
        return Cluster(1, _read(environ, "NPROC_PER_NODE", count), "NPROC_PER_NODE", options)
    visible, counted = accelerators(environ, root)
    if not visible:
        visible, counted = smallest, "no accelerator: the smallest world that the parallel sizes need"
    return Cluster(1, visible, counted, options)


def many_nodes(environ: Mapping[str, str]) -> Cluster:
    """ENV=dlc: WORLD_SIZE counts nodes and RANK numbers them. Raises UsageError naming every missing variable."""
    ranks = "NPROC_PER_NODE" if environ.get("NPROC_PER_NODE") else "KUBERNETES_CONTAINER_RESOURCE_GPU"
    needed = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", ranks)
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        names = ", ".join(f"NPROC_PER_NODE (or {name})" if name == ranks else name for name in missing)
        raise UsageError(f"argument 1 (ENV) is dlc, which needs in the environment: {names}")
    nodes, rank = _read(environ, "WORLD_SIZE", count), _read(environ, "RANK", whole)
    if rank >= nodes:
        raise UsageError(f"environment variable RANK is {rank}; allowed: 0 to {nodes - 1} (WORLD_SIZE counts nodes)")
    port = _read(environ, "MASTER_PORT", count)
    if port > LARGEST_PORT:
        raise UsageError(f"environment variable MASTER_PORT is {port}; allowed: 1 to {LARGEST_PORT}")
    options = ["--nnodes", str(nodes), "--node-rank", str(rank)]
    options += ["--master-addr", environ["MASTER_ADDR"], "--master-port", str(port)]
    return Cluster(nodes, _read(environ, ranks, count), f"WORLD_SIZE × {ranks}", options)


def said(v: Mapping[str, Any]) -> Cluster:
    """What a script's variables say; the number of all ranks is computed from them."""
    nodes, rank, port, ranks = v["NNODES"], v["NODE_RANK"], v["MASTER_PORT"], v["GPUS_PER_NODE"]
    if nodes == 1:
        return Cluster(1, ranks, "GPUS_PER_NODE", [*ALONE, "--nnodes", "1"])
    if rank >= nodes:
        raise UsageError(f"--node-rank is {rank}; allowed: 0 to {nodes - 1} (--nnodes counts nodes)")
    if port > LARGEST_PORT:
        raise UsageError(f"--master-port is {port}; allowed: 1 to {LARGEST_PORT}")
    options = ["--nnodes", str(nodes), "--node-rank", str(rank), "--master-addr", v["MASTER_ADDR"]]
    return Cluster(nodes, ranks, "NNODES × GPUS_PER_NODE", [*options, "--master-port", str(port)])


def accelerators(environ: Mapping[str, str], root: Path = Path("/")) -> tuple[int, str]:
    """Visible accelerators and how they were counted, without torch; (0, "") where there is no device file."""
    for kind, variables in VISIBLE.items():
        devices = _device_files(kind, root)
        if devices:
            named = next((name for name in variables if name in environ), None)
            if named is None:
                return devices, f"/dev/{kind}*"
            return _listed(environ[named]), named
    return 0, ""


def threads(environ: Mapping[str, str], ranks: Cluster) -> dict[str, str]:
    """Variables set for the ranks: without accelerators, the cores are divided among them."""
    if "OMP_NUM_THREADS" in environ or accelerators(environ)[0]:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() // ranks.ranks_per_node))}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_files(kind: str, root: Path) -> int:
    if kind == "kfd":  # one file for all of them; a node with SIMD units is a GPU, one without is the processor
        properties = (root / KFD_NODES).glob("*/properties")
        return sum(bool(re.search(r"^simd_count [1-9]", path.read_text(), re.MULTILINE)) for path in properties)
    return sum(bool(re.fullmatch(kind + r"\d+", path.name)) for path in (root / "dev").glob(kind + "*"))


def _listed(text: str) -> int:
    """Devices in a list such as `0,1` or `GPU-…`; nothing after a −1 is visible."""
    names = [name.strip() for name in text.split(",")]
    visible = names[: names.index("-1")] if "-1" in names else names
    return sum(bool(name) for name in visible)


def _read(environ: Mapping[str, str], name: str, parse: Callable[[str], int]) -> int:
    try:
        return parse(environ[name])
    except ValueError:
        allowed = "a whole number ≥ 0" if parse is whole else "a whole number ≥ 1"
        raise UsageError(f"environment variable {name} is {environ[name]!r}; allowed: {allowed}") from None
