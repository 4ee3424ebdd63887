"""Attention: the window against an explicit mask, and half precision beside transformers'."""

import pytest
import torch
from beside_transformers import VOCABULARY, ours, peer

from megatron_patch.model.attention import core_attention


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 8, 9, 16])
@pytest.mark.parametrize("length", [8, 9, 13])
def test_a_window_of_w_tokens_counts_the_query_itself(length, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = (distance >= 0) & (distance < window)
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~seen, -torch.inf)
    wanted = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(core_attention(q, k, v, window), wanted, rtol=1e-5, atol=1e-6)


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
