"""What --verify and --verify-logits find, and let pass."""

import os

import pytest
from conversions import run, write_source

from megatron_patch.checkpoint.formats import FORMATS


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "hf")


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("mixtral_train", "megablocks")])
@pytest.mark.parametrize("options", [["--verify"], ["--verify-logits", 5]], ids=["bits", "logits"])
def test_a_result_that_is_not_the_source_is_not_kept(source, tmp_path, capsys, monkeypatch, options, format):
    """A writer that flips a bit of the first number in whatever it writes."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, _damaged(data), offset))
    assert run(source, tmp_path / "out", "--format", format, *options) == 1
    assert "convert: verification failed: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def _damaged(data):
    data = bytearray(data)
    data[3] ^= 0x40  # a high bit of the first float's exponent
    return memoryview(data)


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bf16"]])
def test_a_good_result_passes_both_proofs(source, tmp_path, capsys, dtype):
    options = ["--tp", 2, "--verify", "--verify-logits", 5, *dtype]
    assert run(source, tmp_path / "out", "--format", "mcore", *options) == 0
    assert "bits verified, logits of 5 tokens verified" in capsys.readouterr().out
