"""How much of the optimizer an automatic offload moves: as few layers as let the plan's estimate fit the device."""

from dataclasses import replace

from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.families.manifest import Entry
from megatron_patch.parallel.grid import Grid
from megatron_patch.plan.memory import memory


def fitting(run: RunConfig, entries: list[Entry], grid: Grid, available: int) -> MemoryConfig:
    """The least offload with which the plan's estimate is at most `available` bytes; all, where none is enough."""
    layers = run.model.num_layers
    for moved in range(layers + 1):
        policy = "static" if moved else "none"
        choice = replace(run.memory, optimizer_offload_policy=policy, optimizer_offload_fraction=moved / layers)
        if int(memory(replace(run, memory=choice), entries, grid)["total"]) <= available:
            return choice
    return choice
