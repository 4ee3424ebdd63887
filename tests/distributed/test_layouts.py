"""One process is the reference for every parallel layout: the same loss, the same gradients, the same steps."""

import dataclasses
from collections import Counter

import pytest
import torch

from layout_step import (
    Outcome,
    Trial,
    check_as_one_process,
    compare,
    one_process,
    outcome_on_rank,
    run_config,
    start,
)
from layouts import LAYOUTS
from layouts import trial as trial_of
from megatron_patch.checkpoint.layouts import cut
from megatron_patch.config.checks import problems
from megatron_patch.families import ALL
from megatron_patch.parallel.mesh import single_process
from megatron_patch.plan.memory import memory
from megatron_patch.train.passes import build_passes
from megatron_patch.train.step import backward
from rank_probes import bf16_shards, rotary_dtypes
from ranks import run_ranks
from tiny_models import MISTRAL, QWEN_MOE, global_batch

SHALLOW = dataclasses.replace(MISTRAL, num_layers=2)
# Experts that two data-parallel ranks cannot share equally.
THREE_EXPERTS = dataclasses.replace(QWEN_MOE, num_layers=2, num_moe_experts=3, moe_router_topk=2)


@pytest.mark.parametrize(
    "line",
    [
        ("llama", 2, "replicated"),
        ("mistral", 4, "tp2 sp cp2 packed"),
        ("qwen1_5 tied", 4, "tp2 sp pp2"),
        ("mixtral", 4, "pp2 vp1 ep2"),
    ],
    ids=str,
)
def test_a_layout_has_the_loss_and_gradients_of_one_process(line):
    check_as_one_process(trial_of(*line))


def test_data_parallel_experts_have_the_loss_and_gradients_of_one_process():
    trial = Trial("qwen1_5_moe", world=2, model=THREE_EXPERTS)
    check_as_one_process(trial)
    alone = one_process(trial.alone)
    assert alone.norm**2 == pytest.approx(sum(g.square().sum().item() for g in alone.gradients.values()), rel=1e-5)


@pytest.mark.parametrize("line", [("mistral", 4, "tp2 sp"), ("deepseek_v2", 2, "tp2 ep2 etp1")], ids=str)
def test_three_optimizer_steps_end_at_the_same_parameters(line):
    check_as_one_process(trial_of(*line, steps=3, dtype=torch.float64))


def test_a_router_computes_in_float32_in_a_bf16_model_and_memory_is_planned_so():
    trial = Trial("qwen1_5_moe", world=2, precision="bf16", model=THREE_EXPERTS)
    (dtypes, held, unsharded), _ = run_ranks(bf16_shards, 2, trial)
    assert dtypes == [torch.float32] * 2
    planned = memory(run_config(trial), trial.entries, trial.grid)
    assert (planned["master_weights"], planned["working_copy"]) == (held, unsharded)


def test_bf16_computes_in_bf16_and_keeps_float32_masters():
    trial = Trial("mistral", world=2, steps=3, precision="bf16", model=SHALLOW)
    rounded, _ = run_ranks(outcome_on_rank, 2, trial)
    assert all(gradient.dtype == torch.float32 for gradient in rounded.gradients.values())
    assert any((g != g.bfloat16().float()).any() for g in rounded.gradients.values()), "gradients were reduced in bf16"
    assert any((weight != weight.bfloat16().float()).any() for weight in rounded.weights.values()), "masters rounded"
    assert rounded.validation != one_process(Trial("mistral", model=SHALLOW)).validation


def test_rotary_tables_stay_float32_whatever_the_layers_compute_in():
    assert run_ranks(rotary_dtypes, 1, Trial("mistral", precision="bf16")) == [{torch.float32}]


def test_masked_tokens_and_micro_batching_do_not_change_the_mean():
    trial, whole, mesh = Trial("mistral"), global_batch(), single_process()
    alone = one_process(trial)
    (model,) = chunks = start(trial, mesh)
    found = backward(build_passes(chunks, mesh, trial.precision), [whole], mesh)
    assert found.item() == pytest.approx(alone.loss, rel=1e-6)
    per_token = model(whole.tokens, whole.labels)
    mean = ((per_token * whole.loss_mask).sum() / whole.loss_mask.sum()).item()
    assert (mean, alone.validation) == pytest.approx((alone.loss, alone.loss), rel=1e-6)


def test_vocabulary_padding_takes_no_part_in_the_softmax():
    (head,) = [entry for entry in Trial("mistral").entries if entry.mcore == "output_layer.weight"]
    last = cut(head, torch.ones(head.shape), rank=1, size=2)
    assert len(last) == 31 and not last[-1].any()  # 61 rows over 2 ranks: the last row of rank 1 is padding


@pytest.fixture
def four_ranks() -> tuple[Trial, list[Outcome]]:
    """What two tensor-parallel ranks and their replicas would find if every one of them were right."""
    trial = trial_of("qwen1_5 tied", 4, "tp2")
    alone = one_process(trial.alone)

    def pieces(rank: int, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {entry.mcore: cut(entry, whole[entry.mcore], rank % 2, 2).clone() for entry in trial.entries}

    return trial, [
        dataclasses.replace(alone, gradients=pieces(rank, alone.gradients), weights=pieces(rank, alone.weights))
        for rank in range(4)
    ]


def test_ranks_that_are_all_right_differ_by_nothing(four_ranks):
    errors = compare(*four_ranks, one_process(four_ranks[0].alone))
    assert (errors.loss, errors.validation, errors.norm, errors.gradient, errors.weight) == (0,) * 5


def test_a_replica_that_differs_in_one_bit_is_named(four_ranks):
    trial, outcomes = four_ranks
    weight = outcomes[3].weights["decoder.final_layernorm.weight"]
    weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    with pytest.raises(AssertionError, match=r"decoder\.final_layernorm\.weight: rank 3 and its replica differ"):
        compare(trial, outcomes, one_process(trial.alone))


def test_a_piece_that_a_rank_lacks_is_named(four_ranks):
    trial, outcomes = four_ranks
    del outcomes[2].gradients["decoder.layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(AssertionError, match=r"layers\.1\.mlp\.linear_fc2\.weight is held by 3 ranks, not 4"):
        compare(trial, outcomes, one_process(trial.alone))


def test_a_wrong_gradient_is_named(four_ranks):
    trial, outcomes = four_ranks
    for outcome in outcomes:
        outcome.gradients["decoder.layers.1.mlp.linear_fc2.weight"] *= 2
    errors = compare(trial, outcomes, one_process(trial.alone))
    assert (errors.gradient, errors.gradient_of) == (1.0, "decoder.layers.1.mlp.linear_fc2.weight")


def test_packed_samples_have_another_loss():
    packed, plain = (one_process(Trial("mistral", is_packed=is_packed)) for is_packed in (True, False))
    assert abs(packed.loss - plain.loss) > 1e-3


def test_the_table_has_sixty_layouts_and_six_of_every_family_that_the_trainer_accepts():
    trials = [trial_of(*line) for line in LAYOUTS]
    families = Counter(each.name.split()[0] for each in trials)
    assert len(set(LAYOUTS)) == len(LAYOUTS) >= 60
    assert families.keys() == ALL.keys() and min(families.values()) >= 6
    assert [line for line, each in zip(LAYOUTS, trials, strict=True) if problems(run_config(each), each.world)] == []
