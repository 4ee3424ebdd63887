"""One process is the reference for every parallel layout: the same loss and the same gradients."""

from types import SimpleNamespace

import pytest
import torch

from layout_step import (
    EXPERTS,
    MODEL,
    TIED,
    bf16_shards,
    family,
    global_batch,
    on_ranks,
    rotary_dtypes_on_ranks,
    step,
    validation,
    validation_on_ranks,
)
from megatron_patch.checkpoint.layouts import cut, join
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.model.build import build_model
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.mesh import single_process
from megatron_patch.plan.memory import memory
from megatron_patch.train.step import backward
from megatron_patch.train.weights import RandomWeights, load_weights
from ranks import run_ranks


def layout(tp: int, sp: bool, do: bool) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sp, use_distributed_optimizer=do)


def joined(config: ModelConfig, tp: int, world: int, results: list, what: int) -> dict[str, torch.Tensor]:
    """Tensors of one data-parallel replica, whole; all replicas must agree bit for bit."""
    for rank in range(tp, world):
        for name, tensor in results[rank][what].items():
            assert torch.equal(tensor, results[rank % tp][what][name]), f"replicas differ in {name}"
    entries = manifest(family(config), config)
    return {e.mcore: join(e, [results[rank][what][e.mcore] for rank in range(tp)]) for e in entries}


LAYOUTS = {
    "tp2": (2, False, True, 2),
    "tp2-sp": (2, True, True, 2),
    "dp2-sharded": (1, False, True, 2),
    "dp2-replicated": (1, False, False, 2),
    "tp2-sp-dp2-sharded": (2, True, True, 4),
    "tp2-dp2-replicated": (2, False, False, 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_loss_and_gradients_of_one_process(name):
    tp, sp, do, world = LAYOUTS[name]
    loss, norm, gradients, _ = step(MODEL, ParallelConfig(), "fp32", single_process())
    results = run_ranks(on_ranks, world, MODEL, layout(tp, sp, do), world, "fp32", 0, torch.float32)
    for rank_loss, rank_norm, _, _ in results:
        assert rank_loss == pytest.approx(loss, rel=1e-6)
        assert rank_norm == pytest.approx(norm, rel=1e-5)
    for parameter, gradient in joined(MODEL, tp, world, results, what=2).items():
        error = (gradient - gradients[parameter]).abs().max() / gradients[parameter].abs().max()
        assert error < 1e-5, f"{parameter}: {error:.1e}"


@pytest.mark.parametrize("name", ["dp2-sharded", "tp2-sp-dp2-sharded", "tp2-dp2-replicated"])
def test_every_rank_has_the_validation_loss_of_one_process(name):
    tp, sp, do, world = LAYOUTS[name]
    alone = validation(ParallelConfig(), single_process())
    assert run_ranks(validation_on_ranks, world, layout(tp, sp, do), world) == pytest.approx([alone] * world, rel=1e-6)


def test_tied_embeddings_collect_both_gradients():
    loss, _, gradients, _ = step(TIED, ParallelConfig(), "fp32", single_process())
    results = run_ranks(on_ranks, 2, TIED, layout(2, True, True), 2, "fp32", 0, torch.float32)
    assert results[0][0] == pytest.approx(loss, rel=1e-6)
    for parameter, gradient in joined(TIED, 2, 2, results, what=2).items():
        torch.testing.assert_close(gradient, gradients[parameter], rtol=0, atol=1e-5 * gradients[parameter].abs().max())


@pytest.mark.parametrize("name", ["dp2-sharded", "dp2-replicated"])
def test_data_parallel_experts_have_the_loss_and_gradients_of_one_process(name):
    tp, sp, do, world = LAYOUTS[name]
    loss, norm, gradients, _ = step(EXPERTS, ParallelConfig(), "fp32", single_process())
    assert norm**2 == pytest.approx(sum(g.square().sum().item() for g in gradients.values()), rel=1e-5)
    results = run_ranks(on_ranks, world, EXPERTS, layout(tp, sp, do), world, "fp32", 0, torch.float32)
    for rank_loss, rank_norm, _, _ in results:
        assert rank_loss == pytest.approx(loss, rel=1e-6)
        assert rank_norm == pytest.approx(norm, rel=1e-5)
    for parameter, gradient in joined(EXPERTS, tp, world, results, what=2).items():
        error = (gradient - gradients[parameter]).abs().max() / gradients[parameter].abs().max()
        assert error < 1e-5, f"{parameter}: {error:.1e}"


def test_a_router_computes_in_float32_in_a_bf16_model_and_memory_is_planned_so():
    (dtypes, held, unsharded), _ = run_ranks(bf16_shards, 2, EXPERTS, 2)
    assert dtypes == [torch.float32]
    run = SimpleNamespace(model=EXPERTS, parallel=ParallelConfig(), precision="bf16")
    planned = memory(run, manifest(family(EXPERTS), EXPERTS), Grid(tp=1, cp=1, ep=1, pp=1, etp=1, world=2))
    assert (planned["master_weights"], planned["working_copy"]) == (held, unsharded)


@pytest.mark.parametrize("name", ["tp2-sp-dp2-sharded", "tp2-dp2-replicated"])
def test_three_optimizer_steps_end_at_the_same_parameters(name):
    """In float64: AdamW turns gradient noise of 1e-7 into 3e-3, so float32 would prove nothing."""
    tp, sp, do, world = LAYOUTS[name]
    _, _, _, wanted = step(MODEL, ParallelConfig(), "fp32", single_process(), 3, torch.float64)
    torch.set_default_dtype(torch.float32)
    results = run_ranks(on_ranks, world, MODEL, layout(tp, sp, do), world, "fp32", 3, torch.float64)
    for parameter, value in joined(MODEL, tp, world, results, what=3).items():
        assert (value - wanted[parameter]).abs().max() < 1e-9, parameter


def test_bf16_computes_in_bf16_and_keeps_float32_masters():
    exact, _, _, _ = step(MODEL, ParallelConfig(), "fp32", single_process())
    (rounded, _, gradients, weights), *_ = run_ranks(
        on_ranks, 2, MODEL, layout(1, False, True), 2, "bf16", 3, torch.float32
    )
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert any((g != g.bfloat16().float()).any() for g in gradients.values()), "gradients were reduced in bf16"
    assert any((weight != weight.bfloat16().float()).any() for weight in weights.values()), "masters were rounded"
    assert rounded != exact


def test_rotary_tables_stay_float32_whatever_the_layers_compute_in():
    assert run_ranks(rotary_dtypes_on_ranks, 1, "bf16") == [{torch.float32}]


def test_masked_tokens_and_micro_batching_do_not_change_the_mean():
    whole = [global_batch()]
    loss, _, _, _ = step(MODEL, ParallelConfig(), "fp32", single_process())
    entries = manifest(ALL["mistral"], MODEL)
    chunks = build_model(MODEL, ParallelConfig(), "fp32", single_process())
    load_weights(chunks, entries, RandomWeights(MODEL, entries, seed=3), single_process())
    assert backward(chunks, whole, single_process()).item() == pytest.approx(loss, rel=1e-6)
    (model,) = chunks
    per_token = model(whole[0].tokens, whole[0].labels)
    mean = (per_token * whole[0].loss_mask).sum() / whole[0].loss_mask.sum()
    assert mean.item() == pytest.approx(loss, rel=1e-6)


def test_vocabulary_padding_takes_no_part_in_the_softmax():
    entries = manifest(ALL["mistral"], MODEL)
    (head,) = [entry for entry in entries if entry.mcore == "output_layer.weight"]
    last = cut(head, torch.ones(head.shape), rank=1, size=2)
    assert len(last) == 31 and not last[-1].any()  # 61 rows over 2 ranks: the last row of rank 1 is padding
