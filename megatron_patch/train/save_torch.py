"""Megatron's classic files, weights only, from the ranks that hold them: one for each tensor, pipeline, expert rank."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.mcore import publish, write_rank
from megatron_patch.checkpoint.megatron_args import megatron_args
from megatron_patch.checkpoint.placement import file_slots, rank_name
from megatron_patch.config.run import RunConfig
from megatron_patch.families.manifest import Entry
from megatron_patch.model.build import DTYPES
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.parallel.progress import Progress
from megatron_patch.parallel.stages import resolve_stages
from megatron_patch.weights.parameters import entry_tensors, named_parameters


def save_weights(
    run: RunConfig,
    chunks: list[GPTModel],
    entries: list[Entry],
    iteration: int,
    mesh: Mesh,
    progress: Progress,
) -> None:
    """Write `iter_NNNNNNN`, weights in the compute precision, and then the tracker. Every rank takes part.

    Where several ranks hold the same file, the first of them writes it.
    """
    root, dtype, target = Path(run.checkpoint.save), DTYPES[run.precision], _target(run, mesh)
    name = rank_name(target, mesh.tp.rank, mesh.pp.rank, mesh.ep.rank)
    names = progress.together("choosing its file", lambda: name)
    is_writer = names.index(name) == mesh.rank
    weights = tensor_parallel_weights(chunks, mesh, dtype, progress, keep=is_writer)

    def write() -> None:
        stages = resolve_stages(run.model.num_layers, run.parallel)
        files: list[dict[str, Tensor]] = [{} for _ in range(target.vp)]
        for slot in file_slots(entries, run.model, target, stages, mesh.pp.rank, mesh.ep.rank):
            files[slot.chunk][slot.key] = weights[slot.entry.mcore]
        moved = partial(progress.moved, f"writing {name}")
        write_rank(root, iteration, name, files, megatron_args(run.model, target, dtype), moved)

    progress.together(f"writing {name}", write if is_writer else lambda: None)
    progress.together(
        "giving it its name", lambda: publish(root, iteration, sorted(set(names))) if mesh.rank == 0 else None
    )


@torch.no_grad()
def tensor_parallel_weights(
    chunks: list[GPTModel], mesh: Mesh, dtype: torch.dtype, progress: Progress, *, keep: bool
) -> dict[str, Tensor]:
    """This rank's tensors by manifest name, in `dtype`, on the CPU, whole over data-parallel ranks.

    Every rank takes part; only those with `keep` hold the result.
    """
    weights = {}
    for name, parameter in named_parameters(chunks).items():
        progress.moved(None)
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            weights |= {part: tensor.to("cpu", dtype, copy=True) for part, tensor in entry_tensors(name, whole, mesh)}
    return weights


def _target(run: RunConfig, mesh: Mesh) -> Target:
    return Target(
        tp=mesh.tp.size,
        pp=mesh.pp.size,
        ep=mesh.ep.size,
        etp=mesh.etp.size,
        vp=len(resolve_stages(run.model.num_layers, run.parallel)[mesh.pp.rank]),
        first_stage_layers=run.parallel.decoder_first_pipeline_num_layers,
    )
