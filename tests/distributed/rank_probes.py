"""What single properties of a rank's model are: the memory it holds, the types it computes in."""

import torch

from layout_step import Trial, mesh_of, start
from megatron_patch.model.router import TopKRouter
from tiny_models import global_batch, micro_batches


def bf16_shards(trial: Trial) -> tuple[list[torch.dtype], int, int]:
    """In a model that computes in bfloat16: the type of each router's weight as its forward sees it, the bytes of this
    rank's shards, and of all parameters as its forward sees them, padded to equal shards."""
    mesh = mesh_of(trial.parallel, trial.world)
    (model,), seen = start(trial, mesh), []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_pre_hook(lambda router, _: seen.append(router.weight.dtype))
    held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    model(micro_batches(mesh.dp.rank, mesh.dp.size)[0].tokens)
    whole = [(len(p), p.nbytes) for p in model.parameters()]  # since reshard_after_forward is off
    return seen, held, sum(size // rows * -(-rows // trial.world) * trial.world for rows, size in whole)


def rotary_dtypes(trial: Trial) -> set[torch.dtype]:
    """The types in which attention receives its rotary tables."""
    (model,), found = start(trial, mesh_of(trial.parallel, trial.world)), set()
    for layer in model.decoder.layers.values():
        layer.self_attention.register_forward_pre_hook(lambda _, given: found.update(t.dtype for t in given[1]))
    model(global_batch().tokens)
    return found
