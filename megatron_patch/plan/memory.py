"""What one device must hold for weights and optimizer, exactly, from the manifest."""

from megatron_patch.config.run import RunConfig
from megatron_patch.families.manifest import Entry
from megatron_patch.parallel.grid import Grid

BYTES = {"fp32": 4, "bf16": 2}
FP32 = 4
ADAM_MOMENTS = 2
ROUTER = ".mlp.router.weight"


def memory(run: RunConfig, entries: list[Entry], grid: Grid) -> dict[str, int | None]:
    """Bytes per device, by part. `activations`, with gradients still being accumulated, are not known here: None.

    Master weights, gradients and both moments are float32, sharded over data-parallel ranks by rows (the last shard
    padded) with the distributed optimizer. The working copy is what the layers compute with; one process that
    computes in float32 uses the master weights themselves. Experts are sharded whole, as rows; routers compute in
    float32.
    """
    shards = grid.dp if run.parallel.use_distributed_optimizer else 1
    held = copied = 0
    for entry in entries:
        if entry.expert:
            continue  # in the parameter that the first expert opens
        shape = local_shape(entry, grid.tp)
        shape = shape if entry.expert is None else (run.model.num_moe_experts, *shape)
        elements = _shard_elements(shape, shards)
        held += elements
        copied += elements * shards * (FP32 if entry.mcore.endswith(ROUTER) else BYTES[run.precision])
    has_copy = grid.dp > 1 or run.precision != "fp32"
    parts = {
        "master_weights": held * FP32,
        "working_copy": copied if has_copy else 0,
        "gradients": held * FP32,
        "optimizer": held * FP32 * ADAM_MOMENTS,
    }
    return {**parts, "known": sum(parts.values()), "activations": None}


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
