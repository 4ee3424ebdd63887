"""Rotary tables at published sizes and far positions, against transformers'."""

import pytest
import torch
from transformers import DeepseekV2Config, LlamaConfig, MistralConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from megatron_patch.families import ALL
from megatron_patch.model.rope import inverse_frequencies, rotary_tables, rotate, softmax_temperature

SIZES = {
    ("mistral", "7B"): (MistralConfig, MistralRotaryEmbedding),
    ("llama", "llama3.1-8B"): (LlamaConfig, LlamaRotaryEmbedding),
    ("deepseek_v2", "A21B"): (DeepseekV2Config, DeepseekV2RotaryEmbedding),
}


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_frequencies_and_far_positions_of_a_published_size_are_those_of_transformers(family, size):
    configuration, embedding = SIZES[family, size]
    ours = ALL[family].config(ALL[family].sizes[size])
    theirs = embedding(configuration(**ALL[family].sizes[size]))
    torch.testing.assert_close(inverse_frequencies(ours, torch.device("cpu")), theirs.inv_freq, rtol=3e-7, atol=0)

    far = 20000
    cos, sin = (table[-1] for table in rotary_tables(ours, torch.arange(far)))
    wanted = theirs(torch.empty(()), torch.tensor([[far - 1]]))
    if isinstance(wanted, tuple):
        wanted = torch.complex(*(table[..., : len(cos)] for table in wanted))
    torch.testing.assert_close(torch.complex(cos, sin), wanted.flatten(), rtol=0, atol=5e-3)  # 1e-7 of 20000 radians


def test_temperatures_of_deepseek_v2_are_those_of_its_paper():
    """mscale = 0.1 · 0.707 · ln 40 + 1 = 1.26080: squared on the scores, and nothing left for the rotation."""
    config = ALL["deepseek_v2"].config(ALL["deepseek_v2"].sizes["A21B"])
    assert softmax_temperature(config) / 192**0.5 == pytest.approx(0.114721, abs=1e-6)
    cos, sin = rotary_tables(config, torch.arange(3))
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(3, 32))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_turns_the_last_channels_and_leaves_the_first(interleaved):
    angle = torch.tensor([[0.0, 0.0], [torch.pi / 2, torch.pi]])
    turned = rotate(torch.tensor([[[9.0, 1.0, 2.0, 3.0, 4.0]]] * 2), (angle.cos(), angle.sin()), interleaved)
    wanted = [9.0, -2.0, 1.0, -3.0, -4.0] if interleaved else [9.0, -3.0, -2.0, 1.0, -4.0]
    torch.testing.assert_close(turned[0, 0], torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(turned[1, 0], torch.tensor(wanted))
