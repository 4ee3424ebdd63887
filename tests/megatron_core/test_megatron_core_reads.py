"""Megatron-Core reads what the converter wrote, in processes of its own (`logits.py`)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from megatron_patch import convert

READER = Path(__file__).with_name("logits.py")
TIMEOUT = 120


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Hugging Face directory, tokens longer than its window, and transformers' logits; 101 tokens need padding."""
    directory = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        rope_theta=5000.0,
        max_position_embeddings=64,
        initializer_range=0.2,  # large enough for every weight to show in the logits
    )
    model = transformers.MistralForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # norms of one would hide a swap
    model.save_pretrained(directory)
    tokens = torch.randint(0, config.vocab_size, (2, 12))
    torch.save(tokens, directory / "tokens.pt")
    with torch.no_grad():
        return directory, model(tokens).logits, without_window(directory, tokens)


def without_window(directory, tokens):
    model = transformers.MistralForCausalLM.from_pretrained(directory, sliding_window=None).eval()
    return model(tokens).logits


def megatron_core_logits(root, tokens, tp, work):
    """Rank 0's logits after `tp` ranks of Megatron-Core loaded `root`."""
    out, rendezvous = work / "logits.pt", work / "rendezvous"
    ranks = [
        subprocess.Popen(
            [sys.executable, READER, root, rendezvous, str(rank), str(tp), tokens, out],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(tp)
    ]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=TIMEOUT)
            assert rank.returncode == 0, output[-2000:]
    finally:
        for rank in ranks:
            rank.kill()
    return torch.load(out)


@pytest.mark.parametrize("tp", [1, 2])
def test_megatron_core_computes_transformers_logits(source, tmp_path, tp):
    directory, logits, unwindowed = source
    command = [str(directory), str(tmp_path / "mcore"), "--format", "mcore", "--tp", str(tp)]
    assert convert.main([*command, "--transformer-impl", "local"]) == 0
    read = megatron_core_logits(tmp_path / "mcore", directory / "tokens.pt", tp, tmp_path)
    assert read.shape[-1] == (101 if tp == 1 else 102)
    assert (read[..., :101] - logits).abs().max() <= 1e-5
    assert (unwindowed - logits).abs().max() > 0.1, "the window must matter, or this test says nothing about it"
