"""One step and one validation pass in one process; other layouts are held to it in `tests/distributed`."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoint import CONFIG, ENTRIES

from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.data.batches import Batch
from megatron_patch.families.manifest import manifest
from megatron_patch.families.mistral import MISTRAL
from megatron_patch.model.build import build_model
from megatron_patch.parallel.mesh import single_process
from megatron_patch.train.loss_scale import LossScale
from megatron_patch.train.optimizer import build_optimizer, gradient_norm, update
from megatron_patch.train.passes import OneStage
from megatron_patch.train.step import StepResult, evaluate, train_step
from megatron_patch.weights.load import RandomWeights, load_weights

MESH, SCALE = single_process(), LossScale.of("fp32")
OPTIMIZER = OptimizerConfig(lr=1e-2, min_lr=0.0, lr_decay_iters=10)
RUN = SimpleNamespace(optimizer=OPTIMIZER, parallel=ParallelConfig())


def tiny_model():
    (model,) = build_model(CONFIG, ParallelConfig(), "fp32", MESH)
    load_weights([model], ENTRIES, RandomWeights(CONFIG, ENTRIES, seed=3), MESH)
    return model


def batches(*shares):
    """A micro-batch per share of unmasked tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, CONFIG.vocab_size, (len(shares), 2, 9), generator=generator)
    masks = [(torch.rand(2, 8, generator=generator) < share).float() for share in shares]
    return [Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), mask) for t, mask in zip(tokens, masks, strict=True)]


def expected_loss(model, micro_batches):
    """The mean over all unmasked tokens, straight from the logits."""
    losses, masks = [], []
    for batch in micro_batches:
        logits = model(batch.tokens).detach()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none"))
        masks.append(batch.loss_mask.flatten())
    return (torch.cat(losses) * torch.cat(masks)).sum() / torch.cat(masks).sum()


def test_a_step_reports_the_loss_before_it_and_lowers_it():
    model, data = tiny_model(), batches(0.9, 0.2)
    optimizer = build_optimizer(OPTIMIZER, [model])
    before = expected_loss(model, data)
    result = train_step(RUN, OneStage([model], MESH), optimizer, ENTRIES, data, MESH, SCALE)
    assert result.loss == pytest.approx(before.item(), rel=1e-6) and result.gradient_norm > 0
    assert expected_loss(model, data) < before


def test_matrices_decay_and_norms_do_not():
    model = tiny_model()
    optimizer = build_optimizer(OptimizerConfig(lr=0.1, min_lr=0.0, lr_decay_iters=10, weight_decay=0.5), [model])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 0.95 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("limit", "loss_scale"), [(0.1, 1.0), (0.1, 2.0**20), (1e9, 8.0), (0.0, 8.0), (1e9, 1.0)])
def test_a_step_is_clipped_and_unscaled_as_torch_does_it_by_hand(limit, loss_scale):
    ours, theirs = tiny_model(), tiny_model()
    optimizer, witness = build_optimizer(OPTIMIZER, [ours]), build_optimizer(OPTIMIZER, [theirs])
    for seed in range(2):  # the second step shows what is left of the first's limit
        generator = torch.Generator().manual_seed(seed)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = torch.randn(mine.shape, generator=generator)
            mine.grad = other.grad * loss_scale
        norm = gradient_norm([ours], ENTRIES, MESH, sharded=False, loss_scale=loss_scale)
        update(optimizer, norm.item(), limit=limit / (1 + seed), loss_scale=loss_scale)
        wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit / (1 + seed) or math.inf)
        witness.step()
        torch.testing.assert_close(norm, wanted)
    for state, expected in zip(optimizer.state.values(), witness.state.values(), strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=0.0)


def test_validation_weighs_every_token_the_same():
    model, data = tiny_model(), batches(0.9, 0.2, 0.5)
    validation = evaluate(OneStage([model], MESH), [data[:1], data[1:]], MESH)
    assert validation == pytest.approx(expected_loss(model, data).item(), rel=1e-6)


def test_validation_without_a_token_is_told():
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(OneStage([tiny_model()], MESH), [batches(0.0)], MESH)


def test_a_step_with_nothing_to_learn_has_loss_and_gradient_zero():
    model = tiny_model()
    result = train_step(
        RUN, OneStage([model], MESH), build_optimizer(OPTIMIZER, [model]), ENTRIES, batches(0.0), MESH, SCALE
    )
    assert (result.loss, result.gradient_norm) == (0.0, 0.0)


def test_a_step_that_is_not_finite_leaves_weights_and_moments_alone_and_is_counted():
    model = tiny_model()
    optimizer, passes = build_optimizer(OPTIMIZER, [model]), OneStage([model], MESH)
    train_step(RUN, passes, optimizer, ENTRIES, batches(0.9), MESH, SCALE)
    torch.nn.init.constant_(model.decoder.final_layernorm.weight, math.nan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]
    result = train_step(RUN, passes, optimizer, ENTRIES, batches(0.9), MESH, SCALE)
    fields = result.fields()
    assert (fields["number of skipped iterations"], fields["number of nan iterations"]) == (1, 1)
    assert all(torch.equal(before[n], t) or "final_layernorm" in n for n, t in model.state_dict().items())
    after = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert len(moments) == len(after) and all(map(torch.equal, moments, after))


@pytest.mark.parametrize(
    ("result", "skipped", "nan"),
    [
        (StepResult(math.inf, 1.0), 1, 1),
        (StepResult(1.0, math.nan), 1, 0),
        (StepResult(1.0, math.inf), 1, 0),
        (StepResult(1.0, 0.0), 0, 0),
    ],
)
def test_loss_and_norm_each_tell(result, skipped, nan):
    fields = result.fields()
    assert (fields["number of skipped iterations"], fields["number of nan iterations"]) == (skipped, nan)


def test_random_weights_are_megatrons():
    config = dataclasses.replace(CONFIG, hidden_size=400, ffn_hidden_size=300, num_layers=8, init_method_std=0.02)
    drawn = RandomWeights(config, entries := manifest(MISTRAL, config), seed=5)
    tensors = {entry.mcore: drawn.read(entry) for entry in entries}
    layer = "decoder.layers.3."
    for name, std in {
        "embedding.word_embeddings.weight": 0.02,
        layer + "mlp.linear_fc1.weight": 0.02,
        layer + "mlp.linear_fc2.weight": 0.005,  # / sqrt(2 layers)
        layer + "self_attention.linear_proj.weight": 0.005,
    }.items():
        assert tensors[name].std().item() == pytest.approx(std, rel=0.05)
    assert (tensors[layer + "mlp.linear_fc1.layer_norm_weight"] == 1).all()
    assert not torch.equal(tensors[layer + "mlp.linear_fc2.weight"], tensors["decoder.layers.4.mlp.linear_fc2.weight"])
