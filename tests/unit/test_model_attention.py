"""Core attention beside explicit masks, packed samples beside their documents, half precision beside transformers."""

import dataclasses

import pytest
import torch
from beside_transformers import VOCABULARY, ours, peer
from torch import Tensor

from megatron_patch.config.model import ModelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.model import core_attention
from megatron_patch.model.core_attention import Bounds, CoreAttention, Flash, attend, find_segments
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import Axis, single_process
from megatron_patch.parallel.zigzag import held

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=31,
    max_position_embeddings=64,
)
LATENT = dataclasses.replace(
    MODEL,
    num_query_groups=4,
    q_lora_rank=8,
    kv_lora_rank=12,
    qk_head_dim=6,
    qk_pos_emb_head_dim=4,
    v_head_dim=7,
    rotary_interleaved=True,
)
# Lengths of the documents in each row: one alone, many, some of one token.
DOCUMENTS = ((24,), (5, 1, 11, 7), (1, 1, 1, 3, 18))


def by_mask(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention through a mask of every query and key [L, K]."""
    group = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(group, 1).mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v.repeat_interleave(group, 1)


def random_heads(queries: int, keys: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, 4, queries, 8), torch.randn(rows, 2, keys, 8), torch.randn(rows, 2, keys, 8)


def starts_of(documents: tuple[int, ...]) -> Tensor:
    ends = torch.tensor(documents).cumsum(0)
    return torch.repeat_interleave(ends - torch.tensor(documents), torch.tensor(documents))


@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 7, 8, 9, 16])
@pytest.mark.parametrize(("queries", "keys"), [(8, 8), (9, 9), (13, 13), (1, 9), (5, 13), (12, 13)])
def test_a_window_of_w_tokens_counts_the_query_itself(queries, keys, window, monkeypatch):
    """And the last queries of a sample, which a rank may have without the first, see the keys before them."""
    monkeypatch.setattr(core_attention, "BLOCK", 5)
    q, k, v = random_heads(queries, keys)
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
    wanted = by_mask(q, k, v, (distance >= 0) & (distance < (window or keys)))
    torch.testing.assert_close(attend(q, k, v, window), wanted, rtol=1e-5, atol=1e-6)


def test_no_mask_has_the_length_of_the_sample_twice(monkeypatch):
    sizes, plain = [], core_attention.scaled_dot_product_attention

    def noted(q, k, v, attn_mask=None, **settings):
        sizes.append(0 if attn_mask is None else attn_mask.numel())
        return plain(q, k, v, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(core_attention, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(core_attention, "BLOCK", 16)
    packed = find_segments(torch.zeros(1, 128, dtype=torch.int64), (range(128, 256),))
    CoreAttention(None, Axis())(*random_heads(128, 256), packed)
    CoreAttention(32, Axis())(*random_heads(256, 256))
    assert max(sizes) == 16 * 256
    assert sorted(sizes)[-9] <= 16 * (32 + 16), "the windowed ones are narrower"


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (1, 4), (3, 4)])
@pytest.mark.parametrize("kernel", ["PyTorch's", "a flash kernel"])
def test_a_rank_sees_of_packed_samples_what_a_mask_would_show(kernel, rank, size, window):
    q, k, v = random_heads(24, 24, rows=len(DOCUMENTS))
    starts = torch.stack([starts_of(row) for row in DOCUMENTS])
    runs = held(rank, size, 24)
    mine = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    core, dtype = CoreAttention(window, Axis(rank, size)), torch.float32
    if kernel == "a flash kernel":
        core.flash, dtype = Flash(masked_flash, is_fastest=True), torch.bfloat16
    queries, keys = torch.arange(24)[:, None], torch.arange(24)[None, :]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    found = core(q[:, :, mine], k, v, find_segments(starts[:, mine], runs))
    for row, first in enumerate(starts):
        seen = (keys >= first[:, None]) & (keys <= queries) & (queries - keys < (window or 24))
        wanted = by_mask(*(x[None, row].float() for x in (q, k, v)), seen)[:, :, mine]
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(found[None, row].float(), wanted, **tolerance)
    whole = core(q[:, :, mine], k, v)
    wanted = by_mask(q.float(), k.float(), v.float(), (keys <= queries) & (queries - keys < (window or 24)))[:, :, mine]
    torch.testing.assert_close(whole.float(), wanted, **tolerance)


def masked_flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, bounds: Bounds | None
) -> Tensor:
    """What a flash kernel does with windows and with segments that lie one behind the other."""
    assert scale is None and q.dtype == torch.bfloat16
    if bounds is None:
        bounds = Bounds(torch.tensor([0, q.shape[1]]), torch.tensor([0, k.shape[1]]), q.shape[1], k.shape[1])
        return torch.stack([masked_flash(*row, scale, window, bounds) for row in zip(q, k, v, strict=True)])
    assert bounds.longest_queries == bounds.queries.diff().max() and bounds.longest_keys == bounds.keys.diff().max()
    assert bounds.queries[-1] == len(q) and bounds.keys[-1] == len(k)
    outputs = []
    for (a, b), (c, d) in zip(bounds.queries.unfold(0, 2, 1), bounds.keys.unfold(0, 2, 1), strict=True):
        distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)[None, :]
        seen = (distance >= 0) & (distance < (window or len(k)))
        parts = (x.transpose(0, 1)[None].float() for x in (q[a:b], k[c:d], v[c:d]))
        outputs.append(by_mask(*parts, seen)[0].transpose(0, 1).bfloat16())
    return torch.cat(outputs)


@pytest.mark.parametrize(
    "config",
    [MODEL, dataclasses.replace(MODEL, window_size=4), LATENT],
    ids=["full", "window", "latent"],
)
def test_packed_documents_have_the_loss_and_gradients_of_each_by_itself(config):
    torch.manual_seed(0)
    model = GPTModel(config, range(config.num_layers), single_process())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, labels = torch.randint(0, 31, (2, len(DOCUMENTS), 24))
    starts = torch.stack([starts_of(row) for row in DOCUMENTS])

    packed = model(tokens, labels, starts)
    packed.square().sum().backward()  # a gradient of its own for every token
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row, documents in enumerate(DOCUMENTS):
        ends = torch.tensor(documents).cumsum(0).tolist()
        for begin, end in zip([0, *ends], ends, strict=False):
            alone = model(tokens[None, row, begin:end], labels[None, row, begin:end])
            torch.testing.assert_close(packed[None, row, begin:end], alone, rtol=1e-5, atol=1e-5)
            alone.square().sum().backward()
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error <= 1e-5, f"{name}: {error:.1e}"
    assert set(gradients) == {entry.mcore for entry in manifest(ALL[family(config)], config)}


def family(config: ModelConfig) -> str:
    return "deepseek_v2" if config.is_mla else "mistral"


def test_a_half_precision_forward_stays_close_and_computes_rotation_and_norm_in_float32(tmp_path):
    theirs = peer("mistral")
    theirs.save_pretrained(tmp_path)
    model = ours(tmp_path, "mistral")
    tokens = torch.randint(0, VOCABULARY, (2, 16))
    exact = model(tokens)
    rounded = model.bfloat16()(tokens)
    reference = theirs.bfloat16()(tokens).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().mean() <= 1.2 * (reference - exact).abs().mean()
