"""A whole training run of seconds: its data, its tokenizer, its settings, and what it leaves."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_patch.checkpoint.distcp import Part, map_part, read_index
from megatron_patch.config.checkpoint import CheckpointConfig
from megatron_patch.config.data import DataConfig
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.parallel.grid import resolve_grid
from megatron_patch.parallel.mesh import Mesh, build_mesh
from megatron_patch.train.loop import train
from tiny_models import MODELS

TRACKER = "latest_checkpointed_iteration.txt"
LENGTH = 16


def tiny_run(directory: Path, name: str = "mistral", parallel: ParallelConfig | None = None, **checkpoint) -> RunConfig:
    """Four iterations of eight samples, saved after every second, in `directory`, which gets data and a tokenizer."""
    model = MODELS[name]
    if not (directory / "data.idx").exists():
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (60, 2 * LENGTH))
        with IndexedDatasetBuilder(directory / "data", "uint16") as builder:
            builder.add(tokens.ravel(), [2 * LENGTH] * 60, [1] * 60)
        words = {f"w{number}": number for number in range(model.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(directory)
    paths = (str(directory / "data"),)
    return RunConfig(
        model=model,
        parallel=parallel or ParallelConfig(),
        data=DataConfig(
            train_data_path=paths,
            valid_data_path=paths,
            split="90,10,0",
            seq_length=LENGTH,
            max_padding_length=LENGTH,
            tokenizer_model=str(directory),
        ),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_decay_iters=4),
        checkpoint=CheckpointConfig(**{"save": str(directory / "out"), "save_interval": 2} | checkpoint),
        family=name.split()[0],
        train_iters=4,
        micro_batch_size=1,
        global_batch_size=8,
        precision="fp32",
        eval_iters=1,
        log_file=str(directory / "log.jsonl"),
    )


def mesh_of(run: RunConfig, world: int) -> Mesh:
    """The mesh of this rank among `world`, on the CPU."""
    return build_mesh(
        resolve_grid(run.parallel, world),
        torch.device("cpu"),
        sharded=run.parallel.use_distributed_optimizer,
        sequence_parallel=run.parallel.sequence_parallel,
        timeout_minutes=1.0,
    )


def train_on_ranks(run: RunConfig, world: int) -> None:
    """What `run_ranks` runs."""
    train(run, mesh_of(run, world))


def saved(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an iteration: weights, moments and random states, put together box by box."""
    tensors = {}
    for name, stored in read_index(directory).items():
        whole = torch.full(stored.shape, 77, dtype=stored.dtype)
        for box in stored.boxes:
            place = tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
            whole[place] = map_part(Part(box, stored.dtype, tuple(slice(0, n) for n in box.shape)))
        tensors[name] = whole
    return tensors


def check_same_tensors(one: Path, other: Path) -> None:
    """Assert that two iterations hold the same bits, random states left aside."""
    tensors, others = ({n: t for n, t in saved(path).items() if not n.startswith("random")} for path in (one, other))
    assert tensors.keys() == others.keys() and len(tensors) > 10
    assert not [name for name in tensors if not torch.equal(tensors[name], others[name])]


def losses(run: RunConfig, name: str = "lm loss") -> dict[int, float]:
    """Training loss, or what else the run's log has under `name`, by iteration."""
    rows = [json.loads(line) for line in Path(run.log_file).read_text().splitlines()]
    assert len({row["iteration"] for row in rows}) == len(rows), "an iteration is logged twice"
    return {row["iteration"]: row[name] for row in rows if name in row}


def go_back(run: RunConfig, iteration: int, out: Path) -> RunConfig:
    """A copy of the run's output in `out` as it was after `iteration`, and the run that would continue it."""
    shutil.copytree(run.checkpoint.save, out)
    for path in out.glob("iter_*"):
        if int(path.name.removeprefix("iter_")) > iteration:
            shutil.rmtree(path)
    (out / TRACKER).write_text(str(iteration))
    log = out.with_suffix(".jsonl")
    shutil.copy(run.log_file, log)
    checkpoint = dataclasses.replace(run.checkpoint, save=str(out))
    return dataclasses.replace(run, checkpoint=checkpoint, log_file=str(log))
