"""The converter run as its command, on a tiny source with every kind of file that travels along."""

import torch
from safetensors.torch import load_file
from tiny_checkpoint import hf_tensors, write_directory

from megatron_patch import convert

ASSETS = {
    "tokenizer.model": b"\x00binary",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "generation_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "words.tiktoken": b"IQ== 0",
    "modeling_remote.py": b"raise SystemExit('run')",
}


def write_source(directory):
    """A Hugging Face directory with tokenizer files, in float32."""
    write_directory(directory, hf_tensors())
    for name, content in ASSETS.items():
        (directory / name).write_bytes(content)
    return directory


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def tensors_of(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
