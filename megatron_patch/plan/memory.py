"""What one device must hold: weights and optimizer exactly, from the manifest, and an estimate of the activations."""

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_patch.config.run import RunConfig
from megatron_patch.families.manifest import EMBEDDING, Entry
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.stages import resolve_stages
from megatron_patch.plan.activations import activations
from megatron_patch.plan.moments import FP32, MOMENTS, StateBytes, Weights, fullest_moment

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
ROUTER = ".mlp.router.weight"


def memory(run: RunConfig, entries: list[Entry], grid: Grid, *, on_cpu: bool = False) -> dict[str, int | str]:
    """Bytes per device, by part, of the pipeline stage that holds most; `host` is what is kept in host memory instead.

    Master weights, gradients and both moments are float32, sharded over data-parallel ranks by rows (the last shard
    padded) with the distributed optimizer. The working copy is what the layers compute with; one process that
    computes in float32 uses the master weights themselves. Over several micro-batches gradients accumulate in float32
    beside the working copy, as whole as it, and are added up over ranks once. Experts are sharded whole, as rows;
    routers compute in float32. Activations and logits are an estimate.

    Not all parts are held at the same time: `total` is what is held at the `fullest` moment of the run. With `on_cpu`
    ranks compute in host memory, where their checkpoints are copied too, and a copy of it waits to be written.
    """
    stages = resolve_stages(run.model.num_layers, run.parallel)
    of_stages = (_stage_memory(run, entries, grid, stages, stage, on_cpu) for stage in range(len(stages)))
    return max(of_stages, key=lambda parts: parts["total"])


def _stage_memory(
    run: RunConfig, entries: list[Entry], grid: Grid, stages: list[list[range]], stage: int, on_cpu: bool
) -> dict[str, int | str]:
    if on_cpu:  # there, activations are offloaded to where they are
        run = replace(run, memory=replace(run.memory, cpu_offloading_num_layers=0))
    weights = _weights(run, _entries_of(entries, run, stages, stage), grid, stages[stage])
    kept = activations(run, grid, BYTES[run.precision], stages, stage)
    is_accumulating = run.global_batch_size > run.micro_batch_size * grid.dp
    offloaded = sum(part.offloaded for part in weights.values())
    has_copy = grid.dp_cp > 1 or grid.edp > 1 or run.precision != "fp32" or offloaded > 0
    held = sum(part.held for part in weights.values()) * FP32
    whole = sum(part.whole for part in weights.values()) * FP32
    parts = {
        "master_weights": held,
        "working_copy": sum(part.copied for part in weights.values()) if has_copy else 0,
        "gradients": held,
        "accumulated_gradients": whole if has_copy and is_accumulating else 0,
        "optimizer": held * MOMENTS,
        "activations": kept.kept,
        "logits": kept.logits,
        "checkpoint_copy": _checkpoint_copy(run, weights, grid) if on_cpu else 0,
    }
    host = offloaded * FP32 * (2 + MOMENTS)
    rows = -(-run.model.vocab_size // grid.tp) if stage == len(stages) - 1 else 0
    first = rows * run.model.hidden_size * (BYTES[run.precision] if has_copy else FP32)
    fullest, total = fullest_moment(
        weights,
        kept,
        StateBytes(**parts, host=host if on_cpu else 0, output_gradient=first),
        is_accumulating=is_accumulating,
        is_saved_early=run.checkpoint.save_interval < run.train_iters,
        on_cpu=on_cpu,
    )
    return {**parts, "total": total, "fullest": fullest, "host": host}


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


def _weights(run: RunConfig, entries: Iterator[Entry], grid: Grid, chunks: list[range]) -> dict[int, Weights]:
    """By layer, in order, −1 for what is in none: what one rank holds of them."""
    of_layers = {layer: Weights() for layer in (-1, *(layer for chunk in chunks for layer in chunk))}
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
        size = FP32 if entry.mcore.endswith(ROUTER) else BYTES[run.precision]
        is_offloaded = run.memory.is_all_on_host or entry.layer in on_host
        of_layers[-1 if entry.layer is None else entry.layer].add(elements, shards, size, is_offloaded)
    return of_layers


def _checkpoint_copy(run: RunConfig, weights: dict[int, Weights], grid: Grid) -> int:
    """Bytes of the copies from which a checkpoint is written beside training: replicas of a part take turns with it."""
    if run.checkpoint.ckpt_format != "dcp":
        return 0
    turns = 1 if run.parallel.use_distributed_optimizer else grid.dp_cp
    return sum(part.held + part.offloaded for part in weights.values()) * FP32 * (1 + MOMENTS) // turns


def local_shape(entry: Entry, tp: int) -> tuple[int, ...]:
    """The shape of one tensor-parallel rank's part; vocabulary rows are padded until they divide."""
    if entry.shard is None:
        return entry.shape
    if entry.shard == "row":
        return (*entry.shape[:-1], entry.shape[-1] // tp)
    return (-(-entry.shape[0] // tp), *entry.shape[1:])


def _shard_elements(shape: tuple[int, ...], shards: int) -> int:
    return -(-shape[0] // shards) * math.prod(shape[1:])
