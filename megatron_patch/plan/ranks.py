"""Which rank holds what: its place on every axis, its layers, its experts, embedding and output layer."""

from typing import Any

from megatron_patch.config.run import RunConfig
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.stages import resolve_stages

AXES = ("tp", "cp", "dp", "pp", "ep")
MOST = 4096  # ranks that are listed one by one


def ranks(run: RunConfig, grid: Grid) -> list[dict[str, Any]]:
    """One row per rank, the first 4096 of them; layers and experts as ranges: `0–15`, of interleaved stages several."""
    stages = resolve_stages(run.model.num_layers, run.parallel)
    return [_row(run, grid, rank, stages) for rank in range(min(grid.world, MOST))]


def _row(run: RunConfig, grid: Grid, rank: int, stages: list[list[range]]) -> dict[str, Any]:
    stage, experts = grid.coordinate(rank, "pp"), run.model.num_moe_experts
    held = experts // grid.ep
    first = grid.coordinate(rank, "ep") * held
    return {
        "rank": rank,
        **{axis: grid.coordinate(rank, axis) for axis in AXES},
        "layers": ", ".join(map(spelled, stages[stage])),
        "experts": spelled(range(first, first + held)) if experts else None,
        "embedding": stage == 0 or (run.model.share_embeddings_and_output_weights and stage == grid.pp - 1),
        "output_layer": stage == grid.pp - 1,
    }


def spelled(numbers: range) -> str:
    """`0–15`, or `7` where there is but one."""
    first, last = numbers.start, numbers.stop - 1
    return str(first) if first == last else f"{first}–{last}"
