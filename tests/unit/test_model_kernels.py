"""The choice of an attention kernel: by machine and by trial; where there is a GPU, each beside plain attention."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from megatron_patch.config.model import ModelConfig
from megatron_patch.model import kernels
from megatron_patch.model.core_attention import CoreAttention, find_segments
from megatron_patch.model.kernels import (
    CUDNN,
    EFFICIENT,
    FLASH,
    FLASH_3,
    OF_PYTORCH,
    PLAIN,
    Heads,
    Kernel,
    first_that_runs,
    kernel_order,
    resolve_kernel,
    using,
)
from megatron_patch.parallel.mesh import Axis, single_process
from megatron_patch.parallel.zigzag import held

BF16, FP32 = torch.bfloat16, torch.float32
HEADS = Heads(queries=4, groups=2, width=16, value_width=16, dtype=BF16, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "capability", "importable", "dtype", "order"),
    [
        ("cuda", (9, 0), ["flash_attn_interface"], BF16, (FLASH_3, CUDNN, FLASH, EFFICIENT, PLAIN)),
        ("cuda", (9, 0), ["flashattn_hopper"], torch.float16, (FLASH_3, CUDNN, FLASH, EFFICIENT, PLAIN)),
        ("cuda", (9, 0), [], BF16, (CUDNN, FLASH, EFFICIENT, PLAIN)),
        ("cuda", (10, 0), ["flash_attn_interface"], BF16, (CUDNN, FLASH, EFFICIENT, PLAIN)),
        ("cuda", (8, 0), ["flash_attn_interface"], BF16, (FLASH, CUDNN, EFFICIENT, PLAIN)),
        ("cuda", (7, 5), [], torch.float16, (EFFICIENT, PLAIN)),
        ("cuda", (9, 0), ["flash_attn_interface"], FP32, (EFFICIENT, PLAIN)),
        ("cpu", None, ["flash_attn_interface"], FP32, ()),
        ("npu", None, [], BF16, ()),
    ],
)
def test_the_order_in_which_a_machine_tries_its_kernels(device, capability, importable, dtype, order):
    assert kernel_order(device, capability, importable, dtype) == order


@pytest.mark.parametrize(
    ("fastest", "said", "backends"), [(True, "PyTorch's choice for cpu", ()), (False, PLAIN, (0,))]
)
def test_what_use_flash_attn_asks_for_is_said_and_used(fastest, said, backends):
    config = ModelConfig(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
        vocab_size=8,
        max_position_embeddings=8,
    )
    kernel = resolve_kernel(config, single_process(), FP32, fastest=fastest)
    assert kernel.description.startswith(said)
    assert kernel.backends == tuple(SDPBackend(number) for number in backends)


def test_a_kernel_that_fails_or_is_wrong_is_passed_over_and_named(monkeypatch):
    package = ModuleType("flash_attn_interface")
    package.flash_attn_func = lambda q, k, v, **_: q + 0 * (k.sum() + v.sum())  # runs, and is not attention
    package.flash_attn_varlen_func = lambda q, k, v, *_, **__: (q + 0 * (k.sum() + v.sum()), None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    kernel = first_that_runs((FLASH_3, CUDNN, PLAIN), ["flash_attn_interface"], HEADS)
    assert (kernel.backends, kernel.flash) == ((SDPBackend.MATH,), None)
    assert kernel.description.startswith(f"{PLAIN}; {FLASH_3} does not run: its result is not that of plain attention")
    assert f"{CUDNN} does not run" in kernel.description


def test_a_flash_kernel_is_given_windows_and_segments_in_its_own_words(monkeypatch):
    calls = []
    package = ModuleType("flash_attn_interface")
    package.flash_attn_func = lambda q, k, v, **settings: calls.append((q.shape, k.shape, settings)) or (q, None)
    package.flash_attn_varlen_func = lambda q, k, v, *places, **settings: calls.append((places, settings)) or q
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    flash = kernels._flash_3(["flash_attn_interface"])
    core = CoreAttention(5, Axis(), scale=0.25)
    q, k, v = (torch.randn(1, heads, 8, 16, dtype=BF16) for heads in (4, 2, 2))
    with using(Kernel("", (), kernels.Flash(flash, is_fastest=True)), [core]):
        assert torch.equal(core(q, k, v), q), "as it came, [B, S, N, D] turned to [B, N, S, D]"
        core(q, k, v, find_segments(torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3]]), (range(8),)))
    settings = {"softmax_scale": 0.25, "causal": True, "window_size": (4, 0), "deterministic": False}
    assert calls[0] == ((1, 8, 4, 16), (1, 8, 2, 16), settings)
    (queries, keys, *longest), told = calls[1]
    assert (queries.tolist(), keys.tolist(), longest, told) == ([0, 3, 8], [0, 3, 8], [5, 5], settings)


def test_only_attention_within_the_context_runs_on_the_kernel():
    q = torch.randn(1, 2, 8, 4)
    with using(Kernel("", (SDPBackend.CUDNN_ATTENTION,)), []), pytest.raises(RuntimeError):
        scaled_dot_product_attention(q, q, q)
    scaled_dot_product_attention(q, q, q)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", [FLASH_3, CUDNN, FLASH, EFFICIENT, PLAIN])
@pytest.mark.parametrize("width", [128, 192])
@pytest.mark.parametrize("window", [None, 100])
def test_a_kernel_of_a_gpu_is_plain_attention_on_every_rank_of_a_packed_sample(name, width, window):
    device = torch.device("cuda", 0)
    importable = [package for package in kernels.FLASH_3_MODULES if kernels.find_spec(package)]
    heads = Heads(8, 2, width, width, BF16, device)
    if name not in kernel_order("cuda", torch.cuda.get_device_capability(), importable, BF16):
        pytest.skip(f"this machine has no {name}")
    kernel = first_that_runs((name, PLAIN), importable, heads)
    print(kernel.description)
    assert kernel.description.startswith(name)
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 2, 512, width, dtype=BF16, device=device)
    starts = torch.tensor([[0] * 130 + [130] * 382, [0] * 512], device=device)
    for rank, packed in ((0, False), (1, False), (0, True), (1, True)):
        runs = held(rank, 2, 512)
        mine = torch.cat([torch.arange(run.start, run.stop, device=device) for run in runs])
        q = torch.randn(2, 8, len(mine), width, dtype=BF16, device=device)
        found = []
        for used in (kernel, Kernel(PLAIN, (OF_PYTORCH[PLAIN],))):
            core = CoreAttention(window, Axis(rank, 2))
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            with using(used, [core]):
                out = core(*leaves, find_segments(starts[:, mine], runs) if packed else None)
                out.float().square().sum().backward()
            found.append([out, *(leaf.grad for leaf in leaves)])
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max(), (rank, packed)
