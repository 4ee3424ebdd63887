"""What to change when a run does not fit its devices, and how much memory each change would leave it needing."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from megatron_patch.config.checks import problems
from megatron_patch.config.run import RunConfig
from megatron_patch.families.manifest import Entry
from megatron_patch.parallel.grid import Grid, resolve_grid
from megatron_patch.plan.memory import memory
from megatron_patch.plan.table import in_units

USABLE = 0.9  # of a device's memory: the rest is for kernels, communication and fragments
FACTORS = (2, 4, 8, 16)  # of the ranks
SHARES = (0.25, 0.5, 0.75, 1.0)
Change = tuple[str, RunConfig]


def advice(run: RunConfig, entries: list[Entry], grid: Grid, available: int, *, on_cpu: bool) -> list[str]:
    """Changes with the memory that the run would then need, those that fit first, the smallest first.

    Of one kind of change the least that fits is named, or the most there is. Two at once where none alone is enough,
    and where they are not either, more ranks.
    """
    alone = list(_measured(_changes(run, on_cpu=on_cpu), entries, grid.world, available, on_cpu))
    if any(needed <= available for _, needed in alone):
        return _sentences(alone, available)
    pairs = [
        (f"{first} and {second}", twice)
        for first, once in _changes(run, on_cpu=on_cpu)
        for second, twice in _changes(once, on_cpu=on_cpu)
        if first.split("=")[0] < second.split("=")[0]
    ]
    together = [one for one in _measured(pairs, entries, grid.world, available, on_cpu) if one[1] <= available]
    ranks = [] if on_cpu or together else _more_ranks(run, entries, grid.world, available)
    return _sentences([*together[:1], *ranks, *alone], available)


def _more_ranks(run: RunConfig, entries: list[Entry], world: int, available: int) -> list[tuple[str, int]]:
    """The fewest ranks, doubled again and again, on which the run fits as it is or with one change."""
    for ranks in (world * factor for factor in FACTORS):
        fitting = [
            (f"{ranks} ranks{f' and {text}' if text else ''}", needed)
            for text, needed in _measured(
                chain([("", run)], _changes(run, on_cpu=False)), entries, ranks, available, False
            )
            if needed <= available
        ]
        if fitting:
            return fitting[:1]
    return []


def _changes(run: RunConfig, *, on_cpu: bool) -> Iterator[Change]:
    """What costs least first."""
    parallel, kept = run.parallel, run.memory
    if not parallel.use_distributed_optimizer:
        yield "DO=true", replace(run, parallel=replace(parallel, use_distributed_optimizer=True))
    if kept.recompute_granularity == "none":
        yield "AC=sel", replace(run, memory=replace(kept, recompute_granularity="selective"))
    size = run.micro_batch_size // 2
    while size:
        yield f"BATCH_SIZE={size}", replace(run, micro_batch_size=size)
        size //= 2
    if kept.recompute_granularity != "full":
        full = replace(kept, recompute_granularity="full", cpu_offloading_num_layers=0)
        yield "AC=full", replace(run, memory=full)
    if kept.recompute_granularity == "none" and not kept.cpu_offloading_num_layers and not on_cpu:
        most = -(-run.model.num_layers // parallel.pipeline_model_parallel_size)
        for layers in (most // 2, most):
            away = replace(kept, cpu_offloading_num_layers=layers)
            yield f"AC=offload MP_AC_LAYERS={layers}", replace(run, memory=away)
    if kept.optimizer_offload_policy == "none" and not on_cpu:
        for share in SHARES:
            static = replace(kept, optimizer_offload_policy="static", optimizer_offload_fraction=share)
            yield f"OPTIMIZER_OFFLOAD={share:g}", replace(run, memory=static)
    for factor in (2, 4, 8):
        tp = parallel.tensor_model_parallel_size * factor
        yield f"TP={tp}", replace(run, parallel=replace(parallel, tensor_model_parallel_size=tp))


def _measured(
    changes: Iterable[Change], entries: list[Entry], world: int, available: int, on_cpu: bool
) -> Iterator[tuple[str, int]]:
    """Of each kind of change that breaks no rule, the first that fits, or the last."""
    found: dict[str, tuple[str, int]] = {}
    for text, run in changes:
        kind = " ".join(part.split("=")[0] for part in text.split(" and "))
        if (kind in found and found[kind][1] <= available) or problems(run, world):
            continue
        found[kind] = text, int(memory(run, entries, resolve_grid(run.parallel, world), on_cpu=on_cpu)["total"])
    yield from found.values()


def _sentences(changes: list[tuple[str, int]], available: int) -> list[str]:
    ordered = sorted(changes, key=lambda change: change[1] > available)
    return [f"{text}: {in_units(needed)}{'' if needed <= available else ', not enough'}" for text, needed in ordered]
