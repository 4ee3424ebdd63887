"""What to say when memory runs out: what the plan expected, by part, and what makes it less."""

from dataclasses import replace

import torch

from megatron_patch.config.run import RunConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.parallel.grid import Grid
from megatron_patch.plan.advice import USABLE, advice
from megatron_patch.plan.memory import memory
from megatron_patch.plan.table import in_units
from megatron_patch.train.offload import resolve_offload
from megatron_patch.train.report import first_words

HOST_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"  # a RuntimeError without a type of its own


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that a device or this machine has no more memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or HOST_ALLOCATOR in str(error)


def out_of_memory(error: Exception, run: RunConfig, grid: Grid) -> str:
    """One sentence: what could not be had, the plan's estimate by part, and what each change would leave it needing."""
    entries, device = manifest(ALL[run.family], run.model), torch.accelerator.current_accelerator()
    run = replace(run, memory=resolve_offload(run, entries, grid, device or torch.device("cpu")))
    parts = memory(run, entries, grid, on_cpu=device is None)
    estimate = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items() if isinstance(size, int))
    least = min([int(parts["total"]), *_present(device)])  # it did not fit, whatever the estimate says
    changes = advice(run, entries, grid, int(least * USABLE), on_cpu=device is None)
    remedies = "; ".join([*changes, "or shorter samples (SEQ_LEN)"])
    return f"out of memory ({first_words(error)}); the plan's estimate per device: {estimate}. To need less: {remedies}"


def _present(device: torch.device | None) -> list[int]:
    """Bytes that the device has; a CPU's are shared with whatever else runs, and are not known afterwards."""
    return [] if device is None else [torch.get_device_module(device).mem_get_info()[1]]
