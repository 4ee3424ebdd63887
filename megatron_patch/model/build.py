"""From a run's configuration to the model on this rank: composed, spread over data-parallel ranks, given memory."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.model.decoder import GPTModel
from megatron_patch.model.moe import Experts
from megatron_patch.model.router import TopKRouter
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.parallel.stages import resolve_stages

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(config: ModelConfig, parallel: ParallelConfig, precision: str, mesh: Mesh) -> list[GPTModel]:
    """This rank's pipeline chunks, one unless the pipeline is interleaved: parameters float32 and uninitialised.

    They compute in `precision`. Data-parallel ranks hold a shard of every parameter with the distributed optimizer,
    else a copy. One process computing in float32 has neither shards nor copies to keep, and its model stays plain.
    """
    with torch.device("meta"):
        chunks = [
            GPTModel(config, layers, mesh) for layers in resolve_stages(config.num_layers, parallel)[mesh.pp.rank]
        ]
    for chunk in chunks:
        if mesh.dp_cp.size > 1 or mesh.edp.size > 1 or precision != "fp32":
            _shard(chunk, mesh, precision)
        chunk.to_empty(device=mesh.device)
    return chunks


def _shard(model: GPTModel, mesh: Mesh, precision: str) -> None:
    mixed = {"param_dtype": DTYPES[precision], "reduce_dtype": torch.float32} if precision != "fp32" else {}
    policy = MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)  # rotary tables stay float32
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)  # which expert is the best must not hang on rounded weights
    for module in model.modules():
        if isinstance(module, TopKRouter):
            _spread(module, mesh.dense_devices, exact)
        elif isinstance(module, Experts):
            _spread(module, mesh.expert_devices, policy)
    for module in (*model.decoder.layers.values(), model):
        _spread(module, mesh.dense_devices, policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the loss is divided by the global token count: gradients only add up
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _spread(module: nn.Module, devices: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    fully_shard(module, mesh=devices, mp_policy=policy, reshard_after_forward=False)


def synchronise_gradients(chunks: list[GPTModel], wanted: bool) -> None:
    """Whether the next backward adds gradients over data-parallel ranks, or keeps them for a later one."""
    for chunk in chunks:
        if isinstance(chunk, FSDPModule):
            chunk.set_requires_gradient_sync(wanted)
            chunk.set_is_last_backward(wanted)
