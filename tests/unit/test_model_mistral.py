"""The decoder against transformers' Mistral: the same weights, read from disk, give the same logits and gradients."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from megatron_patch.checkpoint.layouts import merge
from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.families.resolve import read_config
from megatron_patch.model.attention import core_attention
from megatron_patch.model.build import build_model
from megatron_patch.parallel.mesh import single_process
from megatron_patch.train.weights import load_weights

MISTRAL = ALL["mistral"]
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "sliding_window": None,
}
VARIANTS = {
    "full attention": {},
    "sliding window": {"sliding_window": 5},
    "window one shorter than the sequence": {"sliding_window": 20},
    "window as long as the sequence": {"sliding_window": 21},
    "head_dim is not hidden / heads": {"head_dim": 24},
    "every head its own key": {"num_key_value_heads": 4},
    "one key for all heads": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "another rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


def pair(directory, **options):
    """transformers' model with weights large enough for attention to be sharp, and ours read from its files."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    theirs = MistralForCausalLM(MistralConfig(**TINY | options))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    theirs.save_pretrained(directory)
    config = MISTRAL.config(read_config(directory))
    ours = build_model(config, ParallelConfig(), "fp32", single_process())
    entries = manifest(MISTRAL, config)
    load_weights(ours, entries, open_checkpoint(directory, MISTRAL, config), single_process().tp)
    return theirs, ours, entries, config


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(tmp_path, options):
    theirs, ours, entries, config = pair(tmp_path, **options)
    tokens = torch.randint(0, TINY["vocab_size"], (3, 22))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    reference = theirs(inputs).logits
    assert (ours(inputs) - reference).abs().max() <= 1e-5 * reference.abs().max()

    torch.nn.functional.cross_entropy(reference.flatten(0, 1), labels.flatten()).backward()
    ours(inputs, labels).mean().backward()
    for entry in entries:
        wanted = merge(entry, [theirs.get_parameter(name).grad for name in entry.hf], config)
        error = (ours.get_parameter(entry.mcore).grad - wanted).abs().max() / wanted.abs().max()
        assert error <= 1e-5, f"{entry.mcore}: {error:.1e}"


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
    theirs, ours, _, _ = pair(tmp_path)
    tokens = torch.randint(0, TINY["vocab_size"], (2, 16))
    exact = ours(tokens)
    rounded = ours.bfloat16()(tokens)
    peer = theirs.bfloat16()(tokens).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().mean() <= 1.2 * (peer - exact).abs().mean()
