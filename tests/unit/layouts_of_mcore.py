"""Tiny models of the families that differ on disk, and random weights as a source to write from."""

from pathlib import Path

import torch

from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.mcore import check_mcore, write_mcore
from megatron_patch.checkpoint.mcore_source import McoreSource, open_mcore
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest

_TINY = {
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 21,
}
FRAGMENTS = {
    "mistral": _TINY | {"head_dim": 4},
    "qwen1_5": _TINY | {"tie_word_embeddings": True},
    "mixtral": _TINY | {"head_dim": 4, "num_local_experts": 4},
    "deepseek_v2": _TINY
    | {
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 4,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
    },
}
CONFIGS = {name: ALL[name].config(fragment) for name, fragment in FRAGMENTS.items()}
ENTRIES = {name: manifest(ALL[name], config) for name, config in CONFIGS.items()}


class RandomSource:
    """Every entry of a manifest, drawn once."""

    format, dtype, layout = "random", torch.float32, {}

    def __init__(self, family: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {entry.mcore: torch.randn(entry.shape, generator=generator) for entry in ENTRIES[family]}

    def dtype_of(self, entry):
        return self.tensors[entry.mcore].dtype

    def read(self, entry):
        return self.tensors[entry.mcore]

    def describe(self):
        return "random"


def write(directory: Path, family: str, **layout) -> RandomSource:
    """Write random weights of `family` on `layout` and return them."""
    directory.mkdir(exist_ok=True)
    source, target = RandomSource(family), Target(**layout)
    check_mcore(ENTRIES[family], CONFIGS[family], target)
    write_mcore(directory, ENTRIES[family], CONFIGS[family], source, target)
    return source


def open_it(directory: Path, family: str) -> McoreSource:
    return open_mcore(directory, ENTRIES[family], CONFIGS[family])


def check_equal(source: McoreSource, written: RandomSource, family: str) -> None:
    for entry in ENTRIES[family]:
        assert torch.equal(source.read(entry), written.read(entry)), entry


def payload_of(directory: Path, rank: str) -> dict:
    return torch.load(directory / "release" / rank / "model_optim_rng.pt", weights_only=False)


def rewrite(directory: Path, rank: str, change) -> None:
    """Change one rank file in place."""
    payload = payload_of(directory, rank)
    change(payload)
    torch.save(payload, directory / "release" / rank / "model_optim_rng.pt")
