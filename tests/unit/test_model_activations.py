"""Recomputing and offloading: the same gradients, bit for bit, of fewer tensors kept."""

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
from megatron_patch.parallel.mesh import single_process
from megatron_patch.weights.load import RandomWeights, load_weights

MIXTURE = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=61,
    max_position_embeddings=64,
    window_size=5,
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=24,
    init_method_std=0.2,
)


def step(memory: MemoryConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the elements that autograd kept, weights aside."""
    entries = manifest(ALL["mixtral"], MIXTURE)
    (model,) = build_model(MIXTURE, ParallelConfig(), "fp32", single_process(), memory)
    load_weights([model], entries, RandomWeights(MIXTURE, entries, seed=3), single_process())
    tokens, kept = torch.arange(48).view(2, 24) % 61, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if is_moved(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig(recompute_granularity="full"),
        MemoryConfig(recompute_granularity="full", recompute_num_layers=3),
        MemoryConfig(recompute_granularity="selective"),
        MemoryConfig(cpu_offloading_num_layers=2),
    ],
    ids=["full", "full, three layers together", "selective", "offload"],
)
def test_gradients_are_bit_equal_with_and_without(memory):
    loss, gradients, _ = step(memory)
    wanted_loss, wanted, _ = step(MemoryConfig())
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)


def test_what_is_recomputed_is_not_kept():
    everything = step(MemoryConfig())[2]
    assert step(MemoryConfig(recompute_granularity="selective"))[2] < everything
    assert step(MemoryConfig(recompute_granularity="full"))[2] < 0.4 * everything


def test_weights_and_indices_are_not_moved_to_the_host():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    assert not is_moved(weight) and not is_moved(weight.t()) and not is_moved(torch.ones(2, dtype=torch.int64))
    assert is_moved(weight * 2)
