"""Experts on every kind of layout are those of one process, their auxiliary losses included."""

import dataclasses

import pytest
import torch

from expert_probes import fields_of, fields_of_rank, rows_there_and_back, uneven_experts, uneven_experts_of_rank
from layout_step import Trial, check_as_one_process, one_process, start
from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.model.auxiliary import load_balancing_loss, tokens_per_expert
from megatron_patch.parallel.mesh import single_process
from ranks import run_ranks
from tiny_models import LENGTH, MICRO_BATCH, MODELS, SAMPLES, micro_batches


def balanced(name: str, kind: str = "aux_loss", layers: int = 2) -> ModelConfig:
    """The family's tiny model with auxiliary losses that weigh as much as the loss does."""
    return dataclasses.replace(
        MODELS[name],
        num_layers=layers,
        moe_router_load_balancing_type=kind,
        moe_aux_loss_coeff=0.5,
        moe_z_loss_coeff=0.01,
    )


def layout(tp: int = 1, ep: int = 1, *, etp: int | None = None, sp: bool = False, **others) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        sequence_parallel=sp,
        **others,
    )


MIXTRAL, QWEN = balanced("mixtral"), balanced("qwen1_5_moe")
DEEPSEEK = balanced("deepseek_v2", "seq_aux_loss")


@pytest.mark.parametrize(
    ("name", "model", "parallel", "world"),
    [
        ("mixtral", MIXTRAL, layout(ep=4), 4),
        ("qwen1_5_moe", QWEN, layout(tp=2, ep=2, sp=True), 4),
        ("deepseek_v2", DEEPSEEK, layout(tp=2, ep=2, etp=1), 4),
        ("deepseek_v2", DEEPSEEK, layout(ep=4, context_parallel_size=2), 4),
    ],
    ids=["ep4", "tp2 sp ep2", "tp2 ep2 etp1", "cp2 ep4"],
)
def test_a_layout_has_the_loss_and_gradients_of_one_process(name, model, parallel, world):
    check_as_one_process(Trial(name, parallel, world, model=model))


@pytest.mark.parametrize(
    ("name", "model", "parallel"),
    [
        ("qwen1_5_moe", QWEN, layout(tp=2, ep=2, etp=1, sp=True)),
        ("mixtral", MIXTRAL, layout(ep=2, use_distributed_optimizer=False)),
    ],
    ids=["tp2 sp ep2 etp1", "ep2 dp2 replicated"],
)
def test_three_optimizer_steps_end_at_the_same_parameters(name, model, parallel):
    check_as_one_process(Trial(name, parallel, 4, steps=3, dtype=torch.float64, model=model))


def test_a_rank_without_a_token_and_experts_without_a_row():
    tokens = [5, 0, 2, 0]
    trial = Trial("qwen1_5_moe", layout(ep=4), 4)
    alone = uneven_experts(trial, [sum(tokens)], single_process())
    ranks = run_ranks(uneven_experts_of_rank, 4, trial, tokens)
    for name, wanted in alone.items():
        found = torch.cat([rank[name] for rank in ranks])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(("rows", "held"), [(5, [2, 2, 1]), (2, [1, 1, 0])])
def test_rows_that_ranks_cannot_share_equally_come_back_in_order(rows, held):
    whole = torch.arange(2.0 * rows).view(rows, 2)
    ranks = run_ranks(rows_there_and_back, 3, rows, 3)
    assert [count for count, _, _ in ranks] == held
    for _, joined, gradient in ranks:
        assert torch.equal(joined, whole * 3)
        assert torch.equal(gradient, (whole + 1) * 3)


def test_every_rank_tells_the_same_of_the_routers_as_one_process():
    trial = Trial("deepseek_v2", layout(2, 2, etp=1, sp=True, pipeline_model_parallel_size=2), 4, model=DEEPSEEK)
    alone = fields_of(trial.alone, single_process())
    ranks = run_ranks(fields_of_rank, 4, trial)
    assert all(rank == ranks[0] for rank in ranks)
    assert ranks[0].keys() == alone.keys()
    for name, value in alone.items():
        assert ranks[0][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("granularity", ["none", "full"])
def test_a_step_counts_every_token_once_also_where_forwards_are_repeated(granularity):
    memory = MemoryConfig(recompute_granularity=granularity)
    model = balanced("deepseek_v2", "seq_aux_loss", layers=3)
    fields = fields_of(Trial("deepseek_v2", model=model, memory=memory), single_process())
    for layer in (1, 2):
        load = fields[f"moe/tokens_per_expert_layer_{layer}"]
        assert sum(load) == SAMPLES * LENGTH * model.moe_router_topk
        assert fields[f"moe/max_load_layer_{layer}"] == pytest.approx(max(load) * len(load) / sum(load))
        assert fields[f"moe/min_load_layer_{layer}"] == pytest.approx(min(load) * len(load) / sum(load))
    losses = [fields[f"moe/seq_load_balancing_loss_layer_{layer}"] for layer in (1, 2)]
    assert fields["seq_load_balancing_loss"] == pytest.approx(sum(losses) / 2)
    assert min(losses) > 0.5 and fields["z_loss"] > 0
    assert "moe/tokens_per_expert_layer_0" not in fields


def test_a_model_without_experts_has_nothing_to_tell():
    assert fields_of(Trial("mistral"), single_process()) == {}


def test_a_step_adds_the_gradient_of_the_mean_loss_over_micro_batches():
    """Of the one router of a model: what the coefficient adds to its gradient, by plain autograd."""
    model = dataclasses.replace(balanced("mixtral", layers=1), moe_aux_loss_coeff=0.0)
    name, added = "decoder.layers.0.mlp.router.weight", 0.0
    (chunk,) = start(Trial("mixtral", model=model), single_process())
    router, seen = chunk.decoder.layers["0"].mlp.router, []
    router.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    for batch in micro_batches(0, 1):
        chunk(batch.tokens)
    for x in seen:
        logits = x @ router.weight.t()
        counts = tokens_per_expert(logits.topk(model.moe_router_topk).indices, model.num_moe_experts, logits.dtype)
        balance = load_balancing_loss(logits.softmax(-1), counts, model.moe_router_topk)
        added = added + torch.autograd.grad(balance, router.weight)[0] * MICRO_BATCH / SAMPLES
    weighed = dataclasses.replace(model, moe_aux_loss_coeff=0.5)
    found, without = (one_process(Trial("mixtral", model=m)).gradients[name] for m in (weighed, model))
    torch.testing.assert_close(found - without, 0.5 * added, rtol=0, atol=1e-5 * added.abs().max().item())
    assert added.abs().max() > 1e-3
