"""Half precision, recomputation, offloading and compilation on several ranks."""

import dataclasses

import pytest
import torch

from layout_step import Trial, joined
from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.parallel.mesh import single_process
from precision_probes import (
    Gradients,
    both_ways,
    compiled_and_not,
    gradients,
    gradients_of_rank,
    steps_with_overflows,
    weights_after,
)
from ranks import run_ranks
from tiny_models import MODELS

# Losses of the routers that weigh as much as the loss does.
MIXTRAL = dataclasses.replace(MODELS["mixtral"], num_layers=2, moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.05)
STAGES = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
SCALE = 2.0**10
RECOMPUTED = MemoryConfig(recompute_granularity="full", recompute_num_layers=2)


def alone(trial: Trial) -> Gradients:
    """Those of one process in float32."""
    torch.set_num_threads(1)
    return gradients(dataclasses.replace(trial.alone, precision="fp32"), single_process())


def check_near(trial: Trial, ranks: list[Gradients], tolerance: float) -> None:
    """Assert that the ranks' gradients are one process's in float32 but for `tolerance` of their norm."""
    exact = alone(trial)
    assert ranks[0].loss == pytest.approx(exact.loss, rel=tolerance)
    assert ranks[0].norm == pytest.approx(exact.norm, rel=tolerance)
    whole = joined(trial, [rank.of for rank in ranks])
    for name, wanted in exact.of.items():
        assert (whole[name] - wanted).norm() <= tolerance * wanted.norm(), name
    assert not torch.equal(whole[name], exact.of[name])  # it does round


def test_bf16_keeps_weights_and_sums_gradients_in_float32():
    trial = Trial("mistral", ParallelConfig(), 2, precision="bf16")
    ranks = run_ranks(gradients_of_rank, 2, trial)
    assert all(rank.dtypes == {torch.float32} for rank in ranks)
    check_near(trial, ranks, 0.06)
    for name, gradient in ranks[0].of.items():
        finer = (gradient != gradient.bfloat16()).float().mean()  # than a sum in bfloat16 would be
        assert finer > 0.5, name


def test_fp16_with_a_loss_scale_has_the_gradients_of_float32_router_losses_included():
    trial = Trial("mixtral", STAGES, 4, precision="fp16", model=MIXTRAL)
    check_near(trial, run_ranks(gradients_of_rank, 4, trial, SCALE), 0.02)


def test_an_overflow_on_one_rank_skips_the_step_on_all_and_halves_the_scale_after_its_patience():
    trial = Trial("mixtral", STAGES, 4, precision="fp16", model=MIXTRAL)
    overflows = [True, True, False, True]
    ranks = run_ranks(steps_with_overflows, 4, trial, overflows, 3, SCALE)
    for steps in ranks:
        assert [step.is_changed for step in steps] == [False, False, True, False]
        assert [step.skipped for step in steps] == [1, 1, 0, 1]
        assert [step.scale for step in steps] == [SCALE, SCALE, SCALE / 2, SCALE / 2]
        assert steps[-1].next_scale == SCALE / 4
        assert all(step.is_loss_finite and step.streak == 0 for step in steps)


def test_recomputation_repeats_collectives_of_tensor_expert_and_pipeline_ranks_and_counts_nothing_twice():
    parallel = dataclasses.replace(
        STAGES, sequence_parallel=True, expert_model_parallel_size=2, expert_tensor_parallel_size=1
    )
    plain = Trial("mixtral", parallel, 4, model=dataclasses.replace(MIXTRAL, num_layers=4))
    for kept, repeated in run_ranks(both_ways, 4, plain, dataclasses.replace(plain, memory=RECOMPUTED)):
        assert repeated.loss == kept.loss and kept.of.keys() == repeated.of.keys()
        assert all(torch.equal(repeated.of[name], gradient) for name, gradient in kept.of.items())
        assert repeated.fields == kept.fields and kept.fields


def test_an_offloaded_optimizer_ends_at_the_same_weights():
    plain = Trial("mistral", ParallelConfig(), 2)
    offloads = [
        MemoryConfig(optimizer_offload_policy="static", optimizer_offload_fraction=share) for share in (0.5, 1.0)
    ]
    trials = [plain, *(dataclasses.replace(plain, memory=memory) for memory in offloads)]
    for kept, *moved in run_ranks(weights_after, 2, trials, 3):
        for weights in moved:
            assert all(torch.equal(weights[name], weight) for name, weight in kept.items())


def test_compiled_layers_hold_their_collectives_and_leave_sharding_outside():
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    memory = dataclasses.replace(RECOMPUTED, optimizer_offload_policy="static")  # the latter makes one device sharded
    trial = Trial("mistral", parallel, 2, memory=memory, model=dataclasses.replace(MODELS["mistral"], num_layers=2))
    for plain, compiled, graphs in run_ranks(compiled_and_not, 2, trial):
        assert graphs == 1
        for name, wanted in plain.of.items():
            assert (compiled.of[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
