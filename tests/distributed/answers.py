"""What a tiny model answers: its checkpoint on disk, and on any layout the tokens and scores of the same questions."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_patch.checkpoint.hf import write_hf
from megatron_patch.checkpoint.interface import Target
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.inference.decoding import Completion, Decoding
from megatron_patch.inference.engine import open_engine
from megatron_patch.weights.load import RandomWeights
from tiny_models import MODELS

PROMPTS = [[5, 9, 3], [7] * 2, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [40, 50, 60, 4, 4]]
PAIRS = [(prompt, [8, 30, 14][: 1 + number % 3]) for number, prompt in enumerate(PROMPTS)]
WAYS = (
    Decoding(max_new_tokens=12, stop_ids=(11,)),
    Decoding(max_new_tokens=8, do_sample=True, temperature=0.8, top_k=20, top_p=0.9, num_return_sequences=2),
    Decoding(max_new_tokens=6, num_beams=3, stop_ids=(11, 20)),
)


@dataclass(frozen=True)
class Drawn(RandomWeights):
    """Random weights as a source that a checkpoint can be written from."""

    def dtype_of(self, entry) -> torch.dtype:
        return torch.float32


def write_checkpoint(directory: Path, name: str) -> None:
    """A Hugging Face directory of `MODELS[name]`, without a tokenizer."""
    config, family = replace(MODELS[name], norm_epsilon=1e-6), ALL[name.split()[0]]  # the epsilon that all support
    entries = manifest(family, config)
    write_hf(directory, entries, config, Drawn(config, entries, 3), Target())
    (directory / "config.json").write_text(json.dumps(family.hf_config(config, "float32")))


def answers(
    directory: Path, sizes: tuple[dict[str, int], ...] = ({},)
) -> list[tuple[list[list[Completion]], list[tuple[float, bool]]]]:
    """On each layout the completions of PROMPTS in each of WAYS, and the log-likelihoods of PAIRS."""
    found = []
    for size in sizes:
        engine = open_engine(directory, **size)
        ways = [engine.generate(PROMPTS, way) for way in WAYS]
        alone = [engine.generate(PROMPTS[:1], way) for way in WAYS]  # fewer than data-parallel ranks
        found.append((ways + alone, [*engine.log_likelihoods(PAIRS, 2), *engine.log_likelihoods(PAIRS[:1], 2)]))
    return found
