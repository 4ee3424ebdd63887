"""How much arithmetic a step is, and how long it would take at a stated share of the device's known peak."""

from typing import Any

from megatron_patch.config.checks import sample_length
from megatron_patch.config.run import RunConfig
from megatron_patch.families.family import Family
from megatron_patch.parallel.grid import Grid
from megatron_patch.plan.flops import training_flops
from megatron_patch.plan.machine import Machine

ASSUMED_MFU = 0.4  # of the peak: what well laid out runs of dense models reach; nothing here was measured
IN_HALF_PRECISION = ("bf16", "fp16", "fp8")


def speed(run: RunConfig, family: Family, grid: Grid, machine: Machine) -> dict[str, Any]:
    """Model FLOPs per step; seconds per step and of the whole run, None where the device's peak is in no table."""
    flops = training_flops(family, run.model, sample_length(run)) * run.global_batch_size
    executed = flops * 4 // 3 if run.memory.recompute_granularity == "full" else flops  # one more forward pass
    peak = machine.peak_flops if run.precision in IN_HALF_PRECISION else None
    seconds = executed / (grid.world * peak * ASSUMED_MFU) if peak else None
    return {
        "model_flops_per_step": flops,
        "executed_flops_per_step": executed,
        "device_peak_flops": peak,
        "assumed_share_of_peak": ASSUMED_MFU if peak else None,
        "seconds_per_step": _rounded(seconds),
        "hours_of_run": _rounded(seconds * run.train_iters / 3600) if seconds else None,
        "tokens_per_second": _rounded(run.global_batch_size * sample_length(run) / seconds) if seconds else None,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")
