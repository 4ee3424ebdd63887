"""One process is the reference for every parallel layout: the same loss and the same gradients."""

import pytest
import torch

from megatron_patch.checkpoint.layouts import cut, join
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.data.batches import Batch
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.model.build import build_model
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.mesh import build_mesh, single_process
from megatron_patch.train.optimizer import build_optimizer, clip_gradients, sum_sequence_parallel_gradients
from megatron_patch.train.save import tensor_parallel_weights
from megatron_patch.train.step import backward
from megatron_patch.train.weights import RandomWeights, load_weights
from ranks import run_ranks

# vocab_size is odd: a tensor-parallel rank holds a padding row. Sequences are longer than the window.
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=12,
    vocab_size=61,
    max_position_embeddings=64,
    window_size=7,
    init_method_std=0.2,
)
TIED = ModelConfig(**{**MODEL.__dict__, "share_embeddings_and_output_weights": True})
SAMPLES, LENGTH, MICRO_BATCH = 8, 16, 2


def global_batch() -> Batch:
    """Samples with different numbers of unmasked tokens, so that averaging per rank or micro-batch would be wrong."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, MODEL.vocab_size, (SAMPLES, LENGTH + 1), generator=generator)
    mask = torch.rand(SAMPLES, LENGTH, generator=generator) < torch.linspace(0.1, 1.0, SAMPLES)[:, None]
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask.float())


def micro_batches(rank: int, size: int) -> list[Batch]:
    """This data-parallel rank's share of the global batch, in Megatron's order."""
    whole = global_batch()
    starts = range(rank * MICRO_BATCH, SAMPLES, MICRO_BATCH * size)
    return [Batch(*(t[s : s + MICRO_BATCH] for t in (whole.tokens, whole.labels, whole.loss_mask))) for s in starts]


def step(config: ModelConfig, parallel: ParallelConfig, precision: str, mesh, steps: int = 0, dtype=torch.float32):
    """Loss, gradient norm and this rank's gradients of one accumulation; parameters after `steps` optimizer steps."""
    torch.set_default_dtype(dtype)
    entries = manifest(ALL["mistral"], config)
    model = build_model(config, parallel, precision, mesh)
    load_weights(model, entries, RandomWeights(config, entries, seed=3), mesh.tp)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-2, min_lr=0.0, lr_decay_iters=10), model)
    for number in range(max(steps, 1)):
        optimizer.zero_grad()
        loss = backward(model, micro_batches(mesh.dp.rank, mesh.dp.size), mesh)
        if model.sequence_parallel:
            sum_sequence_parallel_gradients(model, entries, mesh.tp)
        gradients = {name: _whole(p.grad) for name, p in model.named_parameters()}
        sharded = parallel.use_distributed_optimizer
        norm = clip_gradients(model, entries, mesh, limit=0.5, sharded=sharded)
        if steps > number:
            optimizer.step()
    return loss.item(), norm.item(), gradients, tensor_parallel_weights(model, dtype, keep=True)


def _whole(gradient: torch.Tensor) -> torch.Tensor:
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def on_ranks(config: ModelConfig, parallel: ParallelConfig, world: int, precision: str, steps: int, dtype: torch.dtype):
    """What `run_ranks` runs."""
    grid = Grid(tp=parallel.tensor_model_parallel_size, cp=1, ep=1, pp=1, world=world)
    mesh = build_mesh(grid, torch.device("cpu"), sharded=parallel.use_distributed_optimizer)
    return step(config, parallel, precision, mesh, steps, dtype)


def layout(tp: int, sp: bool, do: bool) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sp, use_distributed_optimizer=do)


def joined(config: ModelConfig, tp: int, world: int, results: list, what: int) -> dict[str, torch.Tensor]:
    """Tensors of one data-parallel replica, whole; all replicas must agree bit for bit."""
    for rank in range(tp, world):
        for name, tensor in results[rank][what].items():
            assert torch.equal(tensor, results[rank % tp][what][name]), f"replicas differ in {name}"
    entries = manifest(ALL["mistral"], config)
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


def test_tied_embeddings_collect_both_gradients():
    loss, _, gradients, _ = step(TIED, ParallelConfig(), "fp32", single_process())
    results = run_ranks(on_ranks, 2, TIED, layout(2, True, True), 2, "fp32", 0, torch.float32)
    assert results[0][0] == pytest.approx(loss, rel=1e-6)
    for parameter, gradient in joined(TIED, 2, 2, results, what=2).items():
        torch.testing.assert_close(gradient, gradients[parameter], rtol=0, atol=1e-5 * gradients[parameter].abs().max())


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
    assert any((weight != weight.bfloat16().float()).any() for weight in weights.values()), "masters were rounded"
    assert rounded != exact


def test_masked_tokens_and_micro_batching_do_not_change_the_mean():
    whole = [global_batch()]
    loss, _, _, _ = step(MODEL, ParallelConfig(), "fp32", single_process())
    entries = manifest(ALL["mistral"], MODEL)
    model = build_model(MODEL, ParallelConfig(), "fp32", single_process())
    load_weights(model, entries, RandomWeights(MODEL, entries, seed=3), single_process().tp)
    assert backward(model, whole, single_process()).item() == pytest.approx(loss, rel=1e-6)
    per_token = model(whole[0].tokens, whole[0].labels)
    mean = (per_token * whole[0].loss_mask).sum() / whole[0].loss_mask.sum()
    assert mean.item() == pytest.approx(loss, rel=1e-6)


def test_vocabulary_padding_takes_no_part_in_the_softmax():
    entries = manifest(ALL["mistral"], MODEL)
    (head,) = [entry for entry in entries if entry.mcore == "output_layer.weight"]
    last = cut(head, torch.ones(head.shape), rank=1, size=2)
    assert len(last) == 31 and not last[-1].any()  # 61 rows over 2 ranks: the last row of rank 1 is padding
