"""Tiny random models by manifest name, and what a legacy format's files hold of them."""

import dataclasses
from pathlib import Path

import torch

from megatron_patch.checkpoint.formats import FORMATS, detect_format
from megatron_patch.checkpoint.interface import Target
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest

HF = {
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 21,
    "max_position_embeddings": 64,
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A random model: a Source, its manifest and its config."""

    config: object
    entries: list
    tensors: dict
    dtype: torch.dtype = torch.float32

    def dtype_of(self, entry):
        return self.tensors[entry.mcore].dtype

    def read(self, entry):
        return self.tensors[entry.mcore]

    def write(self, directory: Path, format: str, **layout) -> Path:
        """Write it; the directory."""
        directory.mkdir(exist_ok=True)
        target = Target(**layout)
        FORMATS[format].check(self.entries, self.config, target)
        FORMATS[format].write(directory, self.entries, self.config, self, target)
        return directory

    def open(self, directory: Path):
        """What stands in `directory`, as this model."""
        return detect_format(directory).open(directory, self.entries, self.config)

    def assert_held_by(self, source) -> None:
        """Every tensor, bit for bit."""
        assert all(torch.equal(source.read(entry), self.tensors[entry.mcore]) for entry in self.entries)


def tiny(family: str, **changed) -> Tiny:
    """A random model of `family`."""
    config = ALL[family].config(HF | changed)
    entries = manifest(ALL[family], config)
    torch.manual_seed(0)
    return Tiny(config, entries, {entry.mcore: torch.randn(entry.shape) for entry in entries})


def payload(directory: Path, rank: str = "mp_rank_00") -> dict:
    """The object in a rank's file."""
    return torch.load(directory / "release" / rank / "model_optim_rng.pt", weights_only=False)


def encoder(directory: Path, rank: str = "mp_rank_00") -> dict:
    """The flat part of a rank's file."""
    return payload(directory, rank)["model"]["language_model"]["encoder"]


def rewrite(directory: Path, change, rank: str = "mp_rank_00") -> None:
    """Apply `change` to the object in a rank's file."""
    content = payload(directory, rank)
    change(content)
    torch.save(content, directory / "release" / rank / "model_optim_rng.pt")
