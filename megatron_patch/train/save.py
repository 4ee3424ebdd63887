"""Writing a run's checkpoint: classic mcore files, visible only when every rank has written its own."""

import dataclasses
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_patch.checkpoint.assets import MODEL, TOKENIZER, copy_assets, write_dtype
from megatron_patch.checkpoint.atomic import write_text
from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.mcore import publish, write_rank
from megatron_patch.checkpoint.megatron_args import megatron_args
from megatron_patch.config.run import RunConfig
from megatron_patch.families import ALL
from megatron_patch.families.resolve import read_config
from megatron_patch.model.build import DTYPES
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.train.parameters import entry_tensors, named_parameters


def save_checkpoint(run: RunConfig, chunks: list[GPTModel], iteration: int, mesh: Mesh) -> None:
    """Write `iter_NNNNNNN`, weights in the compute precision, and then the tracker. Every rank takes part."""
    root, dtype = Path(run.checkpoint.save), DTYPES[run.precision]
    weights = tensor_parallel_weights(chunks, mesh, dtype, keep=mesh.dp.rank == 0)
    if mesh.dp.rank == 0:
        args = megatron_args(run.model, Target(tp=mesh.tp.size), dtype)
        write_rank(root, iteration, mesh.tp.rank, weights, args)
    if dist.is_initialized():
        dist.barrier()
    if mesh.rank == 0:
        write_companions(run, root)
        publish(root, iteration, mesh.tp.size)


def write_companions(run: RunConfig, root: Path) -> None:
    """The files beside the weights: configuration, tokenizer, and `run.json`, the resolved run.

    They say what this run trained, with which tokenizer: the start weights' files serve where no option differs.
    """
    family, load, tokenizer = ALL[run.family], run.checkpoint.load, run.data.tokenizer_model
    if load is None:
        hf = family.hf_config(run.model, dtype="float32")
    else:
        copy_assets(Path(load), root, MODEL if tokenizer else (*MODEL, *TOKENIZER))
        hf = family.restated(read_config(load), run.model)
    if tokenizer:
        copy_assets(Path(tokenizer), root, TOKENIZER)
    write_text(root / "config.json", json.dumps(hf, indent=2) + "\n")
    write_dtype(root, str(DTYPES[run.precision]).removeprefix("torch."))
    write_text(root / "run.json", json.dumps(dataclasses.asdict(run), indent=2) + "\n")


@torch.no_grad()
def tensor_parallel_weights(chunks: list[GPTModel], mesh: Mesh, dtype: torch.dtype, *, keep: bool) -> dict[str, Tensor]:
    """This tensor-parallel rank's tensors by manifest name, in `dtype`, on the CPU, whole over data-parallel ranks.

    Every data-parallel rank takes part; only those with `keep` hold the result.
    """
    weights = {}
    for name, parameter in named_parameters(chunks).items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            weights |= {part: tensor.to("cpu", dtype, copy=True) for part, tensor in entry_tensors(name, whole, mesh)}
    return weights
