"""From a run's configuration to a model on this rank: composed, spread over data-parallel ranks, given memory."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.model.decoder import GPTModel
from megatron_patch.model.router import TopKRouter
from megatron_patch.parallel.mesh import Mesh

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(config: ModelConfig, parallel: ParallelConfig, precision: str, mesh: Mesh) -> GPTModel:
    """This rank's parameters, float32 and uninitialised; computes in `precision`.

    Data-parallel ranks hold a shard of every parameter with the distributed optimizer, else a copy. One process
    computing in float32 has neither shards nor copies to keep, and stays a plain module.
    """
    with torch.device("meta"):
        model = GPTModel(config, mesh.tp, parallel.sequence_parallel and mesh.tp.size > 1)
    if mesh.dp.size > 1 or precision != "fp32":
        _shard(model, mesh.data_parallel(sharded=parallel.use_distributed_optimizer), precision)
    return model.to_empty(device=mesh.device)


def _shard(model: GPTModel, devices: DeviceMesh, precision: str) -> None:
    mixed = {"param_dtype": DTYPES[precision], "reduce_dtype": torch.float32} if precision != "fp32" else {}
    policy = MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)  # rotary tables stay float32
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)  # which expert is the best must not hang on rounded weights
    for module in model.modules():
        if isinstance(module, TopKRouter):
            fully_shard(module, mesh=devices, mp_policy=exact, reshard_after_forward=False)
    layers: list[nn.Module] = [*model.decoder.layers, model]
    for module in layers:
        fully_shard(module, mesh=devices, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the loss is divided by the global token count: gradients only add up
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def synchronise_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward adds gradients over data-parallel ranks, or keeps them for a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
        model.set_is_last_backward(wanted)
