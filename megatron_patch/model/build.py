"""From a run's configuration to the model on this rank: composed, spread over data-parallel ranks, given memory."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.model.decoder import GPTModel
from megatron_patch.model.float8 import check_float8, use_float8
from megatron_patch.model.moe import Experts
from megatron_patch.model.router import TopKRouter
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.parallel.stages import resolve_stages

# What layers compute in; float8 is what some of their products are done in, and the rest of such a run is bf16.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def build_model(
    config: ModelConfig, parallel: ParallelConfig, precision: str, mesh: Mesh, memory: MemoryConfig | None = None
) -> list[GPTModel]:
    """This rank's pipeline chunks, one unless the pipeline is interleaved: parameters float32 and uninitialised.

    They compute in `precision`. Data-parallel ranks hold a shard of every parameter with the distributed optimizer,
    else a copy; what `memory` offloads stands in host memory. One process computing in float32 has neither shards nor
    copies to keep, and its model stays plain.
    """
    memory = memory or MemoryConfig()
    if precision == "fp8":
        check_float8(mesh.device)
    stages = resolve_stages(config.num_layers, parallel)
    with torch.device("meta"):
        chunks = [GPTModel(config, layers, mesh, memory) for layers in stages[mesh.pp.rank]]
    for chunk in chunks:
        if precision == "fp8":
            use_float8(chunk.decoder)
        on_host = set(_offloaded(chunk, memory))
        if mesh.dp_cp.size > 1 or mesh.edp.size > 1 or precision != "fp32" or on_host:
            _shard(chunk, mesh, precision, on_host)
        _allocate(chunk, mesh.device, on_host)
    return chunks


def _offloaded(chunk: GPTModel, memory: MemoryConfig) -> Iterator[nn.Module]:
    """The modules whose parameters stand in host memory."""
    if memory.is_all_on_host:
        yield from chunk.modules()
        return
    layers = list(chunk.decoder.layers.values())
    for layer in layers[: memory.layers_on_host(len(layers))]:
        yield from layer.modules()


def _shard(chunk: GPTModel, mesh: Mesh, precision: str, on_host: set[nn.Module]) -> None:
    mixed = {"param_dtype": DTYPES[precision], "reduce_dtype": torch.float32} if precision != "fp32" else {}
    policy = MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)  # rotary tables stay float32
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)  # which expert is the best must not hang on rounded weights
    to_host = CPUOffloadPolicy(pin_memory=mesh.device.type != "cpu")

    def spread(module: nn.Module, devices: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        offload = to_host if module in on_host else OffloadPolicy()
        fully_shard(module, mesh=devices, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)

    for module in list(chunk.modules()):
        if isinstance(module, TopKRouter):
            spread(module, mesh.dense_devices, exact)
        elif isinstance(module, Experts):
            spread(module, mesh.expert_devices, policy)
    for module in (*chunk.decoder.layers.values(), chunk):
        spread(module, mesh.dense_devices, policy)
    for module in chunk.modules():
        if isinstance(module, FSDPModule):  # the loss is divided by the global token count: gradients only add up
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _allocate(chunk: GPTModel, device: torch.device, on_host: set[nn.Module]) -> None:
    """Memory for every parameter, those of inner modules first: a module that shards theirs must find it there."""
    for module in reversed(list(chunk.modules())):
        module.to_empty(device="cpu" if module in on_host else device, recurse=False)


def synchronise_gradients(chunks: list[GPTModel], wanted: bool) -> None:
    """Whether the next backward adds gradients over data-parallel ranks, or keeps them for a later one."""
    for chunk in chunks:
        if isinstance(chunk, FSDPModule):
            chunk.set_requires_gradient_sync(wanted)
            chunk.set_is_last_backward(wanted)
