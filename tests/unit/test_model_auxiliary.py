"""A router's auxiliary losses beside other people's formulas, and their gradient beside plain autograd."""

import dataclasses

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.auxiliary import AuxiliaryLosses, load_balancing_loss, set_auxiliary_scale, tokens_per_expert
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
SEQUENCE, BATCH, EXPERTS, TOPK = 7, 3, 5, 2


def routed() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [S, B, E], double, and the experts that their top-k chooses [S, B, K]."""
    logits = torch.randn(SEQUENCE, BATCH, EXPERTS, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2
    return logits, logits.topk(TOPK).indices


def loss(logits: torch.Tensor, experts: torch.Tensor, **options) -> torch.Tensor:
    counts = tokens_per_expert(experts, EXPERTS, logits.dtype)
    return load_balancing_loss(logits.softmax(-1), counts, TOPK, **options)


def deepseek_sequence_loss(logits: torch.Tensor, experts: torch.Tensor) -> float:
    """arXiv:2405.04434, equations 12 to 14 with a factor of 1, each sequence by itself: sums over tokens, in Python."""
    total = 0.0
    for row in range(BATCH):
        for expert in range(EXPERTS):
            selected = sum(expert in experts[token, row].tolist() for token in range(SEQUENCE))
            fraction = EXPERTS / (TOPK * SEQUENCE) * selected
            total += (
                fraction * sum(logits[token, row].softmax(-1)[expert].item() for token in range(SEQUENCE)) / SEQUENCE
            )
    return total / BATCH


def test_the_batch_loss_is_transformers_divided_by_topk():
    logits, experts = routed()
    theirs = load_balancing_loss_func((logits.flatten(0, 1),), EXPERTS, TOPK)
    assert loss(logits, experts).item() == pytest.approx(theirs.item() / TOPK, rel=1e-6)


def test_the_sequence_loss_is_deepseeks():
    logits, experts = routed()
    found = loss(logits, experts, is_per_sequence=True)
    assert found.item() == pytest.approx(deepseek_sequence_loss(logits, experts), rel=1e-12)
    assert abs(found.item() - loss(logits, experts).item()) > 1e-3


def test_both_losses_are_one_at_balance():
    logits = torch.zeros(EXPERTS, BATCH, EXPERTS)
    turns = (torch.arange(EXPERTS)[:, None, None] + torch.arange(TOPK)).expand(-1, BATCH, -1) % EXPERTS
    for is_per_sequence in (False, True):
        assert loss(logits, turns, is_per_sequence=is_per_sequence).item() == pytest.approx(1.0)


def auxiliary(**options) -> AuxiliaryLosses:
    return AuxiliaryLosses(dataclasses.replace(CONFIG, **options), single_process())


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "none"])
def test_the_injected_gradient_is_that_of_both_losses_times_the_scale(kind):
    logits, experts = routed()
    logits.requires_grad_()
    module = auxiliary(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.3, moe_z_loss_coeff=0.01)
    set_auxiliary_scale([module], 4.0)
    weights = logits.gather(-1, experts).softmax(-1)
    direction = torch.rand_like(weights)
    (found,) = torch.autograd.grad(module(weights, logits, experts), logits, direction, retain_graph=True)
    total = 0.01 * logits.logsumexp(-1).square().mean()
    if kind != "none":
        total = total + 0.3 * loss(logits, experts, is_per_sequence=kind == "seq_aux_loss")
    (wanted,) = torch.autograd.grad((weights * direction).sum() + 4.0 * total, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_weights_pass_unchanged_and_nothing_is_injected_before_a_scale_is_set():
    logits, experts = routed()
    logits.requires_grad_()
    module = auxiliary(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.3, moe_z_loss_coeff=0.01)
    weights = logits.gather(-1, experts).softmax(-1)
    passed = module(weights, logits, experts)
    assert torch.equal(passed, weights)
    wanted, found = (torch.autograd.grad(t.square().sum(), logits, retain_graph=True)[0] for t in (weights, passed))
    torch.testing.assert_close(found, wanted)
