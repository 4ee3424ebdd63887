"""A whole run in one process: what it logs, what it saves and when, and that its schedule reaches the optimizer."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import hf_tensors, write_directory
from tiny_training import ENTRIES, MODEL, iterations_saved, lines, tiny_run

from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.families.mistral import MISTRAL
from megatron_patch.parallel.mesh import single_process
from megatron_patch.train.companions import write_companions
from megatron_patch.train.loop import train
from megatron_patch.weights.load import RandomWeights


@pytest.fixture
def run(tmp_path, tokenizer_directory):
    return tiny_run(tmp_path, tokenizer_directory)


def saved(run, iteration=None):
    """The weights that stand in the output, whole."""
    root = Path(run.checkpoint.save)
    if iteration is not None:
        (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    source = open_checkpoint(root, MISTRAL, MODEL)
    return {entry.mcore: source.read(entry).clone() for entry in ENTRIES}


def test_the_schedule_reaches_the_log_and_the_optimizer(run):
    train(run, single_process())
    assert [line["iteration"] for line in lines(run)] == [0, 1, 2, 3, 4]
    assert [line["consumed samples"] for line in lines(run)[1:]] == [4, 8, 12, 16]
    rates = [line["learning rate"] for line in lines(run)[1:]]
    assert rates == pytest.approx([0.0, 5e-3, 1e-2, 1e-3 + 9e-3 * (1 + math.cos(math.pi / 2)) / 2])
    start = RandomWeights(MODEL, ENTRIES, run.data.seed)
    first = saved(run, 1)
    assert all(torch.equal(first[entry.mcore], start.read(entry)) for entry in ENTRIES), "the first rate is 0"
    # Adam's second step moves what always has the same gradient by the rate.
    moved = (saved(run, 2)["output_layer.weight"] - first["output_layer.weight"]).abs().max().item()
    assert 1e-3 < moved < 7e-3


def test_checkpoints_and_validations_are_due_at_their_intervals_and_at_the_end(run):
    train(
        dataclasses.replace(
            run,
            train_iters=3,
            eval_interval=2,
            checkpoint=dataclasses.replace(run.checkpoint, save_interval=2),
        ),
        single_process(),
    )
    assert iterations_saved(run) == [2, 3]
    assert [line["iteration"] for line in lines(run) if "validation lm loss" in line] == [0, 2, 3]


def test_a_run_that_has_lost_its_way_ends_with_the_module_where_it_shows_and_keeps_what_was_saved(run):
    wild = dataclasses.replace(run.optimizer, lr=1e30, lr_warmup_iters=0)
    with pytest.raises(
        ValueError, match=r"iteration 3 is number 2 in a row .* the output of decoder.layers.0, on rank 0"
    ):
        train(dataclasses.replace(run, optimizer=wild, max_nonfinite_steps=2), single_process())
    assert iterations_saved(run) == [1]
    assert [line["number of skipped iterations"] for line in lines(run)[1:]] == [0, 1]


def start(tmp_path, **changed):
    """A checkpoint of the run's own architecture, with a tokenizer file that is not the run's."""
    directory = write_directory(tmp_path / "start", hf_tensors(config=MODEL))
    hf = MISTRAL.hf_config(MODEL, "float32") | {"sliding_window": 24, "mark": 1} | changed
    (directory / "config.json").write_text(json.dumps(hf))
    (directory / "tokenizer.model").write_text("another")
    (directory / "merges.txt").write_text("another")
    return str(directory)


def companions(run, **model):
    """The config.json and the names of other files that a run with these settings leaves, without training."""
    root = Path(run.checkpoint.save)
    root.mkdir()
    write_companions(dataclasses.replace(run, model=dataclasses.replace(run.model, **model)), root)
    return json.loads((root / "config.json").read_text()), {path.name for path in root.iterdir()}


def test_a_checkpoint_carries_the_tokenizer_that_the_run_used(run, tmp_path, tokenizer_directory):
    loading = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, load=start(tmp_path)))
    hf, names = companions(loading, window_size=24)
    assert hf["mark"] == 1 and "merges.txt" not in names
    saved_tokenizer = Path(run.checkpoint.save) / "tokenizer.model"
    assert saved_tokenizer.read_bytes() == (tokenizer_directory / "tokenizer.model").read_bytes()


def test_without_a_tokenizer_of_its_own_it_carries_the_start_weights(run, tmp_path):
    loading = dataclasses.replace(
        run,
        checkpoint=dataclasses.replace(run.checkpoint, load=start(tmp_path)),
        data=dataclasses.replace(run.data, tokenizer_model=None),
    )
    assert {"merges.txt", "tokenizer.model"} <= companions(loading, window_size=24)[1]


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters"])
def test_a_checkpoint_says_the_architecture_that_was_trained(run, tmp_path, spelling):
    told = {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}[spelling]
    load = start(tmp_path, **{spelling: told})
    loading = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, load=load))
    hf, _ = companions(loading, window_size=8, rotary_base=5e5)
    trained = MISTRAL.config(hf)
    assert (trained.window_size, trained.rotary_base, trained.hidden_size, hf["mark"]) == (8, 5e5, 16, 1)


def test_random_weights_are_described_by_the_run_and_not_by_the_tokenizers_directory(run, tmp_path):
    directory = start(tmp_path, hidden_size=999)
    from_none = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer_model=directory))
    hf, names = companions(from_none, window_size=8)
    assert (hf["hidden_size"], hf["sliding_window"]) == (16, 8) and {"merges.txt", "tokenizer.model"} <= names
