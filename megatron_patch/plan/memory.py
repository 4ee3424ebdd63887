"""What one device must hold: weights and optimizer exactly, from the manifest, and an estimate of the activations."""

from collections.abc import Iterator

from megatron_patch.config.run import RunConfig
from megatron_patch.families.manifest import EMBEDDING, Entry
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.stages import resolve_stages
from megatron_patch.plan.activations import activation_bytes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
FP32 = 4
ADAM_MOMENTS = 2
ROUTER = ".mlp.router.weight"


def memory(run: RunConfig, entries: list[Entry], grid: Grid) -> dict[str, int]:
    """Bytes per device, by part, of the pipeline stage that holds most; `host` is what is kept in host memory instead.

    Master weights, gradients and both moments are float32, sharded over data-parallel ranks by rows (the last shard
    padded) with the distributed optimizer. The working copy is what the layers compute with; one process that
    computes in float32 uses the master weights themselves. Over several micro-batches gradients accumulate in float32
    beside the working copy, as whole as it, and are added up over ranks once. Experts are sharded whole, as rows;
    routers compute in float32. Activations are an estimate.
    """
    stages = resolve_stages(run.model.num_layers, run.parallel)
    of_stages = [
        _stage_memory(run, _entries_of(entries, run, stages, stage), grid, stages[stage])
        for stage in range(len(stages))
    ]
    parts = max(of_stages, key=lambda parts: sum(parts.values()))
    host = parts.pop("host")
    parts["activations"] = activation_bytes(run, grid, BYTES[run.precision])
    return {**parts, "total": sum(parts.values()), "host": host}


def _entries_of(entries: list[Entry], run: RunConfig, stages: list[list[range]], stage: int) -> Iterator[Entry]:
    """What `stage` holds; of tied embeddings both ends of the pipeline have their own."""
    is_first, is_last = stage == 0, stage == len(stages) - 1
    is_tied = run.model.share_embeddings_and_output_weights
    for entry in entries:
        if entry.layer is not None:
            is_here = any(entry.layer in chunk for chunk in stages[stage])
        else:
            is_here = is_first or (is_last and is_tied) if entry.mcore == EMBEDDING else is_last
        if is_here:
            yield entry


def _stage_memory(run: RunConfig, entries: Iterator[Entry], grid: Grid, chunks: list[range]) -> dict[str, int]:
    held = copied = whole = offloaded = 0
    on_host = {layer for chunk in chunks for layer in chunk[: run.memory.layers_on_host(len(chunk))]}
    for entry in entries:
        if entry.expert:
            continue  # in the parameter that the first expert opens
        is_expert = entry.expert is not None
        shape = local_shape(entry, grid.etp if is_expert else grid.tp)
        shape = (run.model.num_moe_experts // grid.ep, *shape) if is_expert else shape
        replicas = grid.edp if is_expert else grid.dp_cp
        shards = replicas if run.parallel.use_distributed_optimizer else 1
        elements = _shard_elements(shape, shards)
        whole += elements * shards
        copied += elements * shards * (FP32 if entry.mcore.endswith(ROUTER) else BYTES[run.precision])
        if run.memory.is_all_on_host or entry.layer in on_host:
            offloaded += elements
        else:
            held += elements
    is_accumulating = run.global_batch_size > run.micro_batch_size * grid.dp
    has_copy = grid.dp_cp > 1 or grid.edp > 1 or run.precision != "fp32" or offloaded
    return {
        "master_weights": held * FP32,
        "working_copy": copied if has_copy else 0,
        "gradients": held * FP32,
        "accumulated_gradients": whole * FP32 if has_copy and is_accumulating else 0,
        "optimizer": held * FP32 * ADAM_MOMENTS,
        "host": offloaded * FP32 * (2 + ADAM_MOMENTS),
    }


def local_shape(entry: Entry, tp: int) -> tuple[int, ...]:
    """The shape of one tensor-parallel rank's part; vocabulary rows are padded until they divide."""
    if entry.shard is None:
        return entry.shape
    if entry.shard == "row":
        return (*entry.shape[:-1], entry.shape[-1] // tp)
    return (-(-entry.shape[0] // tp), *entry.shape[1:])


def _shard_elements(shape: tuple[int, ...], shards: int) -> int:
    per_row = 1
    for size in shape[1:]:
        per_row *= size
    return -(-shape[0] // shards) * per_row
