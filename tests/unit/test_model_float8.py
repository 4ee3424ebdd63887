"""Float8 products, emulated: what they round, and what a run without the hardware is told."""

import pytest
import torch

from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.model.build import build_model
from megatron_patch.model.float8 import use_float8
from megatron_patch.model.linear import ColumnLinear
from megatron_patch.parallel.mesh import Axis, single_process
from megatron_patch.weights.load import RandomWeights, load_weights

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=61,
    max_position_embeddings=64,
    init_method_std=0.2,
)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` as float8 with one scale for the whole tensor holds it."""
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return ((x * scale.float()).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype).float()) / scale.float()


def test_a_product_is_that_of_rounded_factors_in_both_passes():
    torch.manual_seed(0)
    layer = ColumnLinear(32, 48, Axis(), False)
    x, grad = torch.randn(5, 32, requires_grad=True), torch.randn(5, 48)
    use_float8(layer, emulate=True)
    y = layer(x)
    y.backward(grad)
    forward, backward = torch.float8_e4m3fn, torch.float8_e5m2
    x8, w8, g8 = rounded(x.detach(), forward), rounded(layer.weight.detach(), forward), rounded(grad, backward)
    torch.testing.assert_close(y, x8 @ w8.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, g8 @ w8, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, g8.t() @ x8, rtol=1e-5, atol=1e-5)
    assert (y - x @ layer.weight.t()).abs().max() > 1e-3  # it does round


def test_layers_of_one_shape_share_their_product_and_so_what_is_compiled_of_it():
    layers = torch.nn.ModuleList(ColumnLinear(32, width, Axis(), False) for width in (48, 48, 64))
    use_float8(layers, emulate=True)
    assert layers[0].multiply is layers[1].multiply is not layers[2].multiply


def test_a_layer_whose_sizes_do_not_fit_multiplies_as_before():
    layer = ColumnLinear(32, 40, Axis(), False)
    use_float8(layer, emulate=True)
    assert layer.multiply is torch.nn.functional.linear


def test_a_model_in_float8_stays_near_the_exact_one_and_keeps_its_names():
    entries = manifest(ALL["mistral"], CONFIG)
    (model,) = build_model(CONFIG, ParallelConfig(), "fp32", single_process())
    load_weights([model], entries, RandomWeights(CONFIG, entries, seed=3), single_process())
    tokens = torch.arange(24).view(2, 12)
    exact, names = model(tokens[:, :-1], tokens[:, 1:]).mean(), [name for name, _ in model.named_parameters()]
    use_float8(model.decoder, emulate=True)
    loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
    loss.backward()
    assert 0 < abs(loss - exact) < 0.05 * exact
    assert [name for name, p in model.named_parameters() if p.grad is not None] == names


def test_without_the_hardware_the_refusal_names_it():
    with pytest.raises(ValueError, match=r"precision fp8 needs a CUDA GPU \(this device is cpu\); use bf16"):
        build_model(CONFIG, ParallelConfig(), "fp8", single_process())
