"""What an automatic offload of the optimizer becomes on the device of a rank, and what the log says of it."""

import dataclasses

import torch

from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.families.manifest import Entry
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.stages import resolve_stages
from megatron_patch.plan.advice import USABLE
from megatron_patch.plan.offload import fitting


def resolve_offload(run: RunConfig, entries: list[Entry], grid: Grid, device: torch.device) -> MemoryConfig:
    """`run.memory` with `auto` replaced by a share of the layers, or by none where all of it fits or is host memory."""
    if run.memory.optimizer_offload_policy != "auto":
        return run.memory
    if device.type == "cpu":
        return dataclasses.replace(run.memory, optimizer_offload_policy="none")
    _, total = torch.get_device_module(device).mem_get_info()
    return fitting(run, entries, grid, int(total * USABLE))


def described(run: RunConfig) -> list[str]:
    """What the log says of `run.memory`: a line if anything is moved."""
    layers, stages = run.model.num_layers, resolve_stages(run.model.num_layers, run.parallel)
    moved = sum(run.memory.layers_on_host(len(chunk)) for chunks in stages for chunk in chunks)
    if not moved:
        return []
    rest = ", embedding and output layer" if run.memory.is_all_on_host else ""
    return [f"offload: master weights and optimizer state of {moved} of {layers} layers{rest} stand in host memory"]
