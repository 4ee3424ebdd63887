"""The estimate of what autograd keeps, beside what it really keeps."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.model.activations import is_moved
from megatron_patch.model.build import build_model
from megatron_patch.parallel.grid import resolve_grid
from megatron_patch.parallel.mesh import single_process
from megatron_patch.parallel.stages import resolve_stages
from megatron_patch.plan.activations import activations
from megatron_patch.weights.load import RandomWeights, load_weights

SAMPLES, LENGTH, FP32 = 2, 128, 4
GROUPED = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=128,
    max_position_embeddings=256,
)
EVERY_HEAD = dataclasses.replace(GROUPED, num_query_groups=8)
EXPERTS = dataclasses.replace(GROUPED, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=96)
LATENT = dataclasses.replace(
    EVERY_HEAD,
    rotary_interleaved=True,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=48,
    moe_first_dense_layers=1,
    moe_shared_expert_intermediate_size=96,
    moe_router_pre_softmax=True,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_head_dim=16,
    qk_pos_emb_head_dim=8,
    v_head_dim=16,
)


def kept(family: str, config: ModelConfig, memory: MemoryConfig) -> int:
    """Bytes of all activations that a forward pass leaves to the backward pass."""
    (model,) = build_model(config, ParallelConfig(), "fp32", single_process(), memory)
    entries = manifest(ALL[family], config)
    load_weights([model], entries, RandomWeights(config, entries, seed=1), single_process())
    tokens, storages, alive = torch.arange(SAMPLES * (LENGTH + 1)).view(SAMPLES, -1) % config.vocab_size, {}, []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if is_moved(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # an address that is free again would count twice
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(tokens[:, :-1], tokens[:, 1:]).mean()
    return sum(storages.values())


def estimate(config: ModelConfig, memory: MemoryConfig = MemoryConfig(), micro_batches=1, **parallel: int) -> int:  # noqa: B008
    sizes = ParallelConfig(**parallel)
    run = SimpleNamespace(
        model=config,
        parallel=sizes,
        memory=memory,
        micro_batch_size=SAMPLES,
        global_batch_size=SAMPLES * micro_batches,
        data=SimpleNamespace(dataset="MMAP", seq_length=LENGTH),
    )
    grid = resolve_grid(sizes, sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size)
    stages = resolve_stages(config.num_layers, sizes)
    found = [activations(run, grid, FP32, stages, stage) for stage in range(len(stages))]
    return max(stage.kept + stage.logits for stage in found)


@pytest.mark.parametrize(
    ("family", "config"),
    [("mistral", GROUPED), ("llama", EVERY_HEAD), ("mixtral", EXPERTS), ("deepseek_v2", LATENT)],
)
@pytest.mark.parametrize("granularity", ["none", "selective"])
def test_the_estimate_is_what_autograd_keeps(family, config, granularity):
    memory = MemoryConfig(recompute_granularity=granularity)
    assert estimate(config, memory) == pytest.approx(kept(family, config, memory), rel=0.05)


def test_recomputation_keeps_the_layers_inputs_and_one_layer_at_work():
    memory = MemoryConfig(recompute_granularity="full")
    inputs = kept("mistral", GROUPED, memory)
    a_layer = (kept("mistral", GROUPED, MemoryConfig()) - inputs) / GROUPED.num_layers
    assert estimate(GROUPED, memory) == pytest.approx(inputs + a_layer, rel=0.1)


def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages():
    assert estimate(GROUPED, micro_batches=8, pipeline_model_parallel_size=4) == pytest.approx(
        estimate(GROUPED) - SAMPLES * LENGTH * FP32 * (GROUPED.vocab_size + 2 * GROUPED.hidden_size), rel=0.01
    )
    few = estimate(GROUPED, micro_batches=2, pipeline_model_parallel_size=4)
    assert few < estimate(GROUPED, micro_batches=8, pipeline_model_parallel_size=4)
