"""A run as the sections of its plan: plain numbers and texts, ready for JSON."""

from dataclasses import asdict
from typing import Any

from megatron_patch.config.checks import sample_length
from megatron_patch.config.run import RunConfig
from megatron_patch.families.family import Family
from megatron_patch.families.manifest import active_parameter_count, manifest, parameter_count
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.stages import resolve_stages
from megatron_patch.plan.flops import training_flops
from megatron_patch.plan.memory import memory
from megatron_patch.plan.schedule import schedule


def describe(run: RunConfig, family: Family, grid: Grid) -> dict[str, Any]:
    """Sections `model`, `parallel`, `schedule`, `memory` (bytes per device), `output`. `run` has passed its checks."""
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
        "schedule": schedule(run, grid.dp),
        "memory": memory(run, manifest(family, run.model), grid),
        "output": {
            "checkpoint": run.checkpoint.save,
            "tensorboard": run.tensorboard_dir,
            "log": run.log_file,
        },
    }
