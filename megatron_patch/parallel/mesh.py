"""The process groups of a grid, as seen by one rank."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_patch.parallel.grid import Grid

ALONE = Grid(tp=1, cp=1, ep=1, pp=1, etp=1, world=1)


@dataclass(frozen=True)
class Axis:
    """One parallel axis at this rank. `group` is None only where `size` is 1 and nothing is ever sent."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place on every axis, and the device it computes on.

    `dp_cp` are the ranks that hold the same part of a dense parameter, `edp` those that hold the same part of the same
    experts; `embedding` are the first and the last pipeline stage, on these two alone.
    """

    grid: Grid = ALONE
    rank: int = 0
    device: torch.device
    tp: Axis = Axis()
    cp: Axis = Axis()
    dp: Axis = Axis()
    pp: Axis = Axis()
    dp_cp: Axis = Axis()
    etp: Axis = Axis()
    ep: Axis = Axis()
    edp: Axis = Axis()
    embedding: Axis = Axis()
    world: Axis = Axis()
    sequence_parallel: bool = False  # the residual stream is cut along the sequence over `tp`
    dense_devices: DeviceMesh | None = None
    expert_devices: DeviceMesh | None = None

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.pp.rank == 0


def single_process(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of one process that has no process group."""
    return Mesh(device=torch.device(device))


def start_process_group(timeout_minutes: float) -> torch.device:
    """Join the group that torchrun's variables describe. Returns the device of this rank."""
    device = local_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        timeout=timedelta(minutes=timeout_minutes),
        device_id=None if device.type == "cpu" else device,
    )
    return device


def local_device(local_rank: int) -> torch.device:
    """The accelerator with this rank's number where there are any, else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    torch.accelerator.set_device_index(local_rank)
    return torch.device(torch.accelerator.current_accelerator().type, local_rank)


def build_mesh(
    grid: Grid, device: torch.device, *, sharded: bool, sequence_parallel: bool, timeout_minutes: float
) -> Mesh:
    """Groups of every axis of `grid`; the default process group must hold `grid.world` ranks.

    `sharded`: data-parallel ranks cut master weights and optimizer state among themselves (else each holds all). No
    rank waits for another in these groups longer than `timeout_minutes`.
    """
    if dist.get_world_size() != grid.world:
        raise ValueError(f"the grid is for {grid.world} ranks and {dist.get_world_size()} were started")
    rank = dist.get_rank()
    groups = {tuple(range(grid.world)): dist.group.WORLD}
    timeout = timedelta(minutes=timeout_minutes)

    def group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
        if ranks not in groups:
            groups[ranks] = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        return groups[ranks]

    def axis(ranks: tuple[int, ...]) -> Axis:
        return Axis(ranks.index(rank), len(ranks), group(ranks)) if len(ranks) > 1 else Axis()

    def devices(ranks: tuple[int, ...]) -> DeviceMesh:
        shared, alone = group(ranks), group((rank,))
        if sharded:
            return DeviceMesh.from_group(shared, device.type, mesh_dim_names=("shard",))
        one_each = [[peer] for peer in ranks]
        return DeviceMesh.from_group([shared, alone], device.type, one_each, mesh_dim_names=("replicate", "shard"))

    names = ("tp", "cp", "dp", "pp", "dp_cp", "etp", "ep", "edp")
    stages = grid.peers(rank, "pp")
    return Mesh(
        grid=grid,
        rank=rank,
        device=device,
        **{name: axis(grid.peers(rank, name)) for name in names},
        embedding=axis((stages[0], stages[-1])) if len(stages) > 1 and rank in (stages[0], stages[-1]) else Axis(),
        world=axis(tuple(range(grid.world))),
        sequence_parallel=sequence_parallel and grid.tp > 1,
        dense_devices=devices(grid.peers(rank, "dp_cp")),
        expert_devices=devices(grid.peers(rank, "edp")),
    )
