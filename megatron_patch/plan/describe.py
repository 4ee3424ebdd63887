"""A run as the sections of its plan: plain numbers and texts, ready for JSON."""

from collections.abc import Collection
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

from megatron_patch.config.checks import sample_length
from megatron_patch.config.flags import flag
from megatron_patch.config.run import RunConfig
from megatron_patch.families.family import Family
from megatron_patch.families.manifest import active_parameter_count, manifest, parameter_count
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.stages import resolve_stages
from megatron_patch.plan.advice import USABLE, advice
from megatron_patch.plan.flops import training_flops
from megatron_patch.plan.machine import Machine
from megatron_patch.plan.memory import memory
from megatron_patch.plan.offload import fitting
from megatron_patch.plan.ranks import ranks
from megatron_patch.plan.schedule import schedule
from megatron_patch.plan.speed import speed
from megatron_patch.plan.start import start
from megatron_patch.plan.table import in_units

UNKNOWN = Machine("unknown", None, None, is_cpu=False)


def describe(
    run: RunConfig, family: Family, grid: Grid, machine: Machine = UNKNOWN, typed: Collection[str] = ()
) -> dict[str, Any]:
    """Sections `model`, `parallel`, `ranks`, `start`, `schedule`, `memory` (bytes per device), `speed`, `output`,
    `defaults`.

    `run` has passed its checks; `typed` are the flags that the user gave. `cautions` says what to make of the memory.
    """
    stages = resolve_stages(run.model.num_layers, run.parallel)
    return {
        "model": {
            "family": family.name,
            "parameters": parameter_count(family, run.model),
            "active_parameters": active_parameter_count(family, run.model),
            "training_flops_per_sample": training_flops(family, run.model, sample_length(run)),
            **asdict(run.model),
            "precision": run.precision,
        },
        "parallel": {
            **{axis: getattr(grid, axis) for axis in ("tp", "pp", "cp", "ep", "etp", "dp", "edp", "world")},
            "layers_of_stages": [sum(map(len, chunks)) for chunks in stages],
            "virtual_chunks": len(stages[0]),
            "sequence_parallel": run.parallel.sequence_parallel,
            "use_distributed_optimizer": run.parallel.use_distributed_optimizer,
        },
        "ranks": ranks(run, grid),
        "start": start(run),
        "schedule": schedule(run, grid.dp),
        "memory": _memory(run, family, grid, machine),
        "speed": speed(run, family, grid, machine),
        "output": {
            "checkpoint": run.checkpoint.save,
            "tensorboard": run.tensorboard_dir,
            "log": run.log_file,
        },
        "defaults": defaults(run, typed),
    }


def defaults(run: RunConfig, typed: Collection[str] = ()) -> dict[str, Any]:
    """Flag → value of every setting that stands at its default and was not `typed`; the architecture is no choice."""
    found: dict[str, Any] = {}
    for item in fields(run):
        value = getattr(run, item.name)
        owner, names = (value, fields(value)) if is_dataclass(value) else (run, (item,))
        if item.name == "model":
            continue
        for setting in names:
            is_typed = {flag(setting.name), f"--no-{setting.name.replace('_', '-')}"} & set(typed)
            if getattr(owner, setting.name) == setting.default and not is_typed:
                found[flag(setting.name)] = setting.default
    return found


def cautions(sections: dict[str, Any]) -> list[str]:
    """The warnings that `describe`'s sections give rise to: of memory, and of what could not be known."""
    told = _memory_cautions(sections["memory"])
    if sections["speed"]["seconds_per_step"] is None:
        precision, device = sections["model"]["precision"], sections["memory"]["device"]
        told.append(f"how long a step takes is unknown: no table has the {precision} peak of this device, {device}")
    return told


def _memory_cautions(memory: dict[str, Any]) -> list[str]:
    if memory["device_memory"] is None:
        return ["how much memory a device has is unknown: whether the run fits was not looked at"]
    if memory["fits"]:
        return []
    return [
        f"the run may not fit: a device needs about {in_units(memory['total'])} ({memory['fullest']}) and has "
        f"{in_units(memory['device_memory'])}, of which {USABLE:.0%} can be used; what would change that: "
        + "; ".join(memory["advice"] or ["more ranks, or shorter samples"])
    ]


def _memory(run: RunConfig, family: Family, grid: Grid, machine: Machine) -> dict[str, Any]:
    entries = manifest(family, run.model)
    parts = memory(run, entries, grid, on_cpu=machine.is_cpu)
    if machine.memory is None:
        return {**parts, "device": machine.device, "device_memory": None, "fits": None, "advice": []}
    available = int(machine.memory * USABLE)
    if run.memory.optimizer_offload_policy == "auto" and not machine.is_cpu:  # as the ranks will find
        run = replace(run, memory=fitting(run, entries, grid, available))
        parts = memory(run, entries, grid)
    fits = int(parts["total"]) <= available
    changes = [] if fits else advice(run, entries, grid, available, on_cpu=machine.is_cpu)
    return {**parts, "device": machine.device, "device_memory": machine.memory, "fits": fits, "advice": changes}
