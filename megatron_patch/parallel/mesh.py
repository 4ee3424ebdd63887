"""The process groups of a grid, as seen by one rank."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_patch.parallel.grid import Grid


@dataclass(frozen=True)
class Axis:
    """One parallel axis at this rank. `group` is None only where `size` is 1 and nothing is ever sent."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """This rank's place on every axis, and the device it computes on."""

    grid: Grid
    rank: int
    device: torch.device
    tp: Axis
    dp: Axis
    device_mesh: DeviceMesh | None = None

    def data_parallel(self, *, sharded: bool) -> DeviceMesh | None:
        """The mesh over which `fully_shard` cuts (1-D) or replicates (2-D, its shard dimension being 1).

        None where the process group was never started: one process that shares nothing.
        """
        if self.device_mesh is None:
            return None
        return self.device_mesh["shard"] if sharded else self.device_mesh["replicate", "shard"]


def single_process(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of one process that has no process group."""
    return Mesh(Grid(tp=1, cp=1, ep=1, pp=1, world=1), 0, torch.device(device), Axis(), Axis())


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


def build_mesh(grid: Grid, device: torch.device, *, sharded: bool) -> Mesh:
    """Groups of every axis of `grid`; the default process group must hold `grid.world` ranks.

    `sharded`: data-parallel ranks cut master weights and optimizer state among themselves (else each holds all).
    """
    if dist.get_world_size() != grid.world:
        raise ValueError(f"the grid is for {grid.world} ranks and {dist.get_world_size()} were started")
    replicate, shard = (1, grid.dp) if sharded else (grid.dp, 1)
    devices = init_device_mesh(
        device.type,
        (grid.pp, replicate, shard, grid.cp, grid.tp),
        mesh_dim_names=("pp", "replicate", "shard", "cp", "tp"),
    )
    return Mesh(
        grid,
        dist.get_rank(),
        device,
        _axis(devices, "tp"),
        _axis(devices, "shard" if sharded else "replicate"),
        devices,
    )


def _axis(devices: DeviceMesh, name: str) -> Axis:
    return Axis(devices.get_local_rank(name), devices.size(devices.mesh_dim_names.index(name)), devices.get_group(name))
