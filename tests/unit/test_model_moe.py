"""Routing by hand-made scores, and the grouped experts against a loop over them."""

import dataclasses

import pytest
import torch
from torch.nn.functional import silu

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.grouped import grouped_product, looped_product
from megatron_patch.model.moe import Experts
from megatron_patch.model.router import TopKRouter
from megatron_patch.parallel.mesh import single_process

CONFIG = ModelConfig(
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=11,
    max_position_embeddings=8,
    num_moe_experts=5,
    moe_router_topk=2,
    moe_ffn_hidden_size=24,
)


def routed(scores: list[float], **options) -> dict[int, float]:
    """Expert → weight for one token whose softmax over the experts is `scores`."""
    config = dataclasses.replace(CONFIG, hidden_size=1, num_moe_experts=len(scores), **options)
    router = TopKRouter(config, single_process())
    with torch.no_grad():
        router.weight.copy_(torch.tensor(scores).log()[:, None])
        weights, experts = router(torch.ones(1, 1, 1))
    return {
        expert: pytest.approx(weight, rel=1e-5)
        for expert, weight in zip(experts.flatten().tolist(), weights.flatten().tolist(), strict=True)
    }


def test_softmax_first_keeps_the_share_of_all_experts():
    assert routed([0.1, 0.4, 0.2, 0.3], moe_router_pre_softmax=True) == {1: 0.4, 3: 0.3}


def test_softmax_last_shares_one_between_the_chosen():
    assert routed([0.1, 0.4, 0.2, 0.3]) == {1: 4 / 7, 3: 3 / 7}


def test_weights_are_multiplied_by_the_factor():
    assert routed([0.1, 0.4, 0.2, 0.3], moe_router_pre_softmax=True, moe_router_topk_scaling_factor=16.0) == {
        1: 6.4,
        3: 4.8,
    }


def test_a_group_is_chosen_by_its_best_expert_not_by_its_sum():
    options = {"moe_router_num_groups": 3, "moe_router_group_topk": 1, "moe_router_pre_softmax": True}
    assert routed([0.2, 0.19, 0.25, 0.01, 0.17, 0.18], **options) == {2: 0.25, 3: 0.01}


def test_a_group_left_out_gives_no_expert_even_where_its_scores_are_higher():
    options = {"moe_router_num_groups": 3, "moe_router_group_topk": 2, "moe_router_topk": 3}
    assert routed([0.3, 0.02, 0.2, 0.19, 0.21, 0.08], moe_router_pre_softmax=True, **options) == {
        0: 0.3,
        4: 0.21,
        5: 0.08,
    }


def test_the_best_expert_does_not_hang_on_half_precision():
    """Both scores are 1 in bfloat16; the difference is in float32 weights."""
    router = TopKRouter(
        dataclasses.replace(CONFIG, hidden_size=1, num_moe_experts=2, moe_router_topk=1), single_process()
    )
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0], [1.0 + 1e-5]]))
    weights, experts = router(torch.ones(4, 1, 1, dtype=torch.bfloat16))
    assert weights.dtype == torch.float32
    assert experts.tolist() == [[[1]]] * 4


def looped(experts: Experts, x, weights, chosen):
    """Token by token, choice by choice."""
    rows = []
    for token, its_weights, its_experts in zip(x, weights, chosen, strict=True):
        row = torch.zeros_like(token)
        for weight, expert in zip(its_weights, its_experts, strict=True):
            gate, up = (experts.linear_fc1.weight[expert] @ token).chunk(2)
            row = row + weight * (experts.linear_fc2.weight[expert] @ (silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_grouped_experts_are_a_loop_over_experts(tokens):
    torch.manual_seed(tokens)
    experts = Experts(CONFIG, single_process())
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])  # the last expert gets no token
    x = torch.randn(tokens, 16, requires_grad=True)
    weights = torch.rand(tokens, 2, requires_grad=True)
    leaves = [x, weights, *experts.parameters()]
    found, wanted = experts(x, weights, chosen), looped(experts, x, weights, chosen)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    direction = torch.randn_like(wanted)
    for ours, reference in zip(
        torch.autograd.grad(found, leaves, direction), torch.autograd.grad(wanted, leaves, direction), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.float32, 18), (torch.float64, 16)]
)
def test_a_grouped_product_is_the_loop_for_every_type_and_width(dtype, width, rows):
    """Widths of 18 and float64 are what torch's grouped product refuses; the second expert has no row."""
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(rows, width, generator=generator), torch.randn(3, width, 24, generator=generator)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    direction = torch.randn(rows, 24, generator=generator).to(dtype)
    ends = torch.tensor([4 * rows // 9, 4 * rows // 9, rows], dtype=torch.int32)
    found, wanted = (
        [out, *torch.autograd.grad(out, leaves, direction)]
        for out in (product(*leaves, ends) for product in (grouped_product, looped_product))
    )
    for ours, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, reference)
    by_hand = torch.cat([leaves[0][: ends[0]] @ leaves[1][0], leaves[0][ends[0] :] @ leaves[1][2]])
    torch.testing.assert_close(wanted[0], by_hand)
