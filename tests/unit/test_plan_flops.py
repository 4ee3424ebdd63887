"""The arithmetic of a sample, beside PyTorch's own count of what the model really multiplied."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.model.build import build_model
from megatron_patch.parallel.mesh import single_process
from megatron_patch.plan.flops import training_flops
from megatron_patch.weights.load import RandomWeights, load_weights

LENGTH = 24
DENSE = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=61,
    max_position_embeddings=64,
)
EXPERTS = dataclasses.replace(
    DENSE, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24, moe_first_dense_layers=0
)


def test_the_count_is_what_the_model_multiplies_with_half_of_the_scores():
    entries = manifest(ALL["mistral"], DENSE)
    (model,) = build_model(DENSE, ParallelConfig(), "fp32", single_process())
    load_weights([model], entries, RandomWeights(DENSE, entries, seed=1), single_process())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, LENGTH, dtype=torch.int64))
    heads, scores = DENSE.num_layers * DENSE.num_attention_heads, LENGTH * LENGTH
    unseen = 2 * heads * 2 * DENSE.kv_channels * (scores - LENGTH * (LENGTH + 1) // 2)
    assert training_flops(ALL["mistral"], DENSE, LENGTH) == 3 * (counter.get_total_flops() - unseen)


def test_two_experts_cost_what_one_mlp_of_their_width_does_and_a_router():
    mixture, dense = training_flops(ALL["mixtral"], EXPERTS, LENGTH), training_flops(ALL["mistral"], DENSE, LENGTH)
    assert EXPERTS.moe_router_topk * EXPERTS.moe_ffn_hidden_size == DENSE.ffn_hidden_size
    assert mixture - dense == 3 * 2 * LENGTH * DENSE.num_layers * DENSE.hidden_size * EXPERTS.num_moe_experts


def test_a_window_takes_no_more_than_its_band():
    config = dataclasses.replace(DENSE, window_size=5)
    full, banded = (training_flops(ALL["mistral"], c, LENGTH) for c in (DENSE, config))
    pairs = sum(min(i + 1, LENGTH) for i in range(LENGTH)) - sum(min(i + 1, 5) for i in range(LENGTH))
    assert full - banded == 3 * 2 * config.num_layers * config.num_attention_heads * 2 * config.kv_channels * pairs


def test_seven_billion_parameters_take_the_usual_six_operations_each():
    config = ALL["mistral"].config(ALL["mistral"].sizes["7B"])
    assert training_flops(ALL["mistral"], config, 128) == pytest.approx(6 * 7.11e9 * 128, rel=0.01)
