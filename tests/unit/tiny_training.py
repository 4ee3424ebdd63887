"""A whole training run of one process in a second or two, and what it leaves."""

import json
from pathlib import Path

import numpy as np

from megatron_patch.config.checkpoint import CheckpointConfig
from megatron_patch.config.data import DataConfig
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.families.manifest import manifest
from megatron_patch.families.mistral import MISTRAL

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=8,
    vocab_size=600,
    max_position_embeddings=32,
)
ENTRIES = manifest(MISTRAL, MODEL)


def tiny_run(directory: Path, tokenizer_directory: Path) -> RunConfig:
    """Four iterations of four samples, two of them warm-up, saved after each, in `directory`."""
    tokens = np.random.default_rng(0).integers(0, 600, (40, 32))
    with IndexedDatasetBuilder(directory / "data", "uint16") as builder:
        builder.add(tokens.ravel(), [32] * 40, [1] * 40)
    paths = (str(directory / "data"),)
    return RunConfig(
        model=MODEL,
        parallel=ParallelConfig(),
        data=DataConfig(
            train_data_path=paths,
            valid_data_path=paths,
            split="90,10,0",
            seq_length=16,
            max_padding_length=16,
            tokenizer_model=str(tokenizer_directory),
        ),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_warmup_iters=2, lr_decay_iters=4),
        checkpoint=CheckpointConfig(save=str(directory / "out"), save_interval=1),
        family="mistral",
        train_iters=4,
        micro_batch_size=2,
        global_batch_size=4,
        precision="fp32",
        eval_iters=1,
        log_file=str(directory / "log.jsonl"),
    )


def iterations_saved(run: RunConfig) -> list[int]:
    """The numbers of the checkpoints that stand in the output."""
    return sorted(int(path.name.removeprefix("iter_")) for path in Path(run.checkpoint.save).glob("iter_*"))


def lines(run: RunConfig) -> list[dict]:
    """The lines of the log, which must be JSON to a strict reader too."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in Path(run.log_file).read_text().splitlines()]
