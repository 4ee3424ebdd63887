"""What to say when memory runs out: what the plan expected, by part, and what makes it less."""

from dataclasses import replace

import torch

from megatron_patch.config.run import RunConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.parallel.grid import Grid
from megatron_patch.plan.memory import memory
from megatron_patch.plan.table import in_units
from megatron_patch.train.offload import resolve_offload
from megatron_patch.train.report import first_words

HOST_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"  # a RuntimeError without a type of its own


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that a device or this machine has no more memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or HOST_ALLOCATOR in str(error)


def out_of_memory(error: Exception, run: RunConfig, grid: Grid) -> str:
    """One sentence: what could not be had, the plan's estimate by part, and which arguments to change."""
    entries, device = manifest(ALL[run.family], run.model), torch.accelerator.current_accelerator()
    run = replace(run, memory=resolve_offload(run, entries, grid, device or torch.device("cpu")))
    parts = memory(run, entries, grid, on_cpu=device is None)
    estimate = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items() if isinstance(size, int))
    remedies = _remedies(run, grid)
    return f"out of memory ({first_words(error)}); the plan's estimate per device: {estimate}. To need less: {remedies}"


def _remedies(run: RunConfig, grid: Grid) -> str:
    has_host = run.memory.optimizer_offload_policy == "none" and torch.accelerator.is_available()
    remedies = (
        (run.micro_batch_size > 1, f"lower micro_batch_size (BATCH_SIZE, now {run.micro_batch_size})"),
        (True, f"raise tensor_model_parallel_size (TP, now {grid.tp})"),
        (run.memory.recompute_granularity != "full", "recompute activations (AC=full)"),
        (has_host, "keep the optimizer on the host (OPTIMIZER_OFFLOAD=static)"),
        (grid.dp > 1 and not run.parallel.use_distributed_optimizer, "shard the optimizer state (DO=true)"),
        (True, "use shorter samples (SEQ_LEN)"),
    )
    return ", ".join(text for applies, text in remedies if applies)
