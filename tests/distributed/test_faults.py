"""What one rank meets, all answer in the same way: requests to stop, steps that are not finite, bad directories."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

from faulty_run import (
    asked_to_stop,
    hanging_in_a_save,
    sharing,
    slow_in_a_save,
    with_poisoned_gradient,
    with_poisoned_layer,
)
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.parallel.mesh import single_process
from megatron_patch.train import step
from megatron_patch.train.loop import train
from ranks import run_ranks
from tiny_run import check_same_tensors, losses, tiny_run, train_on_ranks

TP2 = ParallelConfig(tensor_model_parallel_size=2)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)


def steps(run):
    """The log's lines of training steps."""
    rows = [json.loads(line) for line in Path(run.log_file).read_text().splitlines()]
    return [row for row in rows if "learning rate" in row]


def test_a_request_that_reaches_one_rank_stops_all_after_the_same_step_and_the_run_goes_on_exactly(tmp_path):
    whole = tiny_run(tmp_path, parallel=TP2, save=str(tmp_path / "whole"), save_interval=4)
    run_ranks(train_on_ranks, 2, whole, 2)
    expected = losses(whole)
    run = tiny_run(tmp_path, parallel=TP2, save_interval=4)
    run_ranks(asked_to_stop, 2, run, 2, 1, 3)
    assert [path.name for path in Path(run.checkpoint.save).glob("iter_*")] == ["iter_0000003"]
    run_ranks(train_on_ranks, 2, run, 2)
    assert losses(run) == expected
    check_same_tensors(*(Path(r.checkpoint.save, "iter_0000004") for r in (whole, run)))


@pytest.mark.parametrize("parallel", [ParallelConfig(), PP2], ids=["dp 2", "pp 2"])
def test_an_infinite_gradient_of_one_rank_is_skipped_by_all_and_counted(tmp_path, parallel):
    run = tiny_run(tmp_path, parallel=parallel, save_interval=1, keep_last=0)
    run_ranks(with_poisoned_gradient, 2, run, 2, 1, 2)
    assert [row["number of skipped iterations"] for row in steps(run)] == [0, 1, 0, 0]
    assert [row["number of nan iterations"] for row in steps(run)] == [0, 0, 0, 0]
    assert [row["grad norm"] is None for row in steps(run)] == [False, True, False, False]
    saved = sorted(path.name for path in Path(run.checkpoint.save).glob("iter_*"))
    assert saved == ["iter_0000001", "iter_0000003", "iter_0000004"], "nothing is saved while a step was skipped"


@pytest.mark.parametrize(
    ("parallel", "rank", "layer", "is_backward", "told"),
    [
        (ParallelConfig(), 1, 2, False, "the output of decoder.layers.2.self_attention.linear_proj, on rank 1"),
        (PP2, 1, 3, False, "the output of decoder.layers.3.self_attention.linear_proj, on rank 1"),
        (PP2, 0, 1, True, "the gradient of the output of decoder.layers.1.self_attention.core_attention, on rank 0"),
    ],
    ids=["dp 2", "pp 2", "pp 2 backward"],
)
def test_too_many_steps_in_a_row_end_the_run_with_the_module_and_the_rank(
    tmp_path, parallel, rank, layer, is_backward, told
):
    run = dataclasses.replace(tiny_run(tmp_path, parallel=parallel, save_interval=9), max_nonfinite_steps=2)
    sentences = run_ranks(with_poisoned_layer, 2, run, 2, rank, layer, is_backward)
    assert sentences[0] == sentences[1]
    assert sentences[0].startswith("iteration 3 is number 2 in a row") and told in sentences[0]


def test_directories_that_are_not_one_are_refused_by_every_rank(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    told = run_ranks(sharing, 2, [tmp_path / "one", tmp_path / "other"])
    assert told[0] == told[1] and told[0].startswith(f"{tmp_path / 'other'} on ") and "OUTPUT_BASEPATH" in told[0]
    assert run_ranks(sharing, 2, [tmp_path / "one"] * 2) == ["shared"] * 2
    assert not list(tmp_path.glob("*/*")), "the token is left behind"


SHORT = ParallelConfig(distributed_timeout_minutes=0.03)
SHORT_SECONDS = 1.8


@pytest.mark.parametrize(
    ("save", "is_stopped", "told"),
    [
        (2, True, "rank 1 was not heard of, last writing embedding.word_embeddings.weight"),
        (2, False, "rank 1 got no further in writing embedding.word_embeddings.weight"),
        (1, False, "rank 1 got no further in writing embedding.word_embeddings.weight"),
    ],
    ids=["stopped in the last save", "blocked in the last save", "blocked in the save before"],
)
def test_a_rank_that_hangs_in_a_save_is_named_on_every_rank_after_the_timeout(tmp_path, save, is_stopped, told):
    run = tiny_run(tmp_path, parallel=SHORT)
    ended = run_ranks(hanging_in_a_save, 2, run, 2, 1, save, is_stopped)
    for seconds, sentence in ended[:1] if is_stopped else ended:
        assert sentence == f"the save of iteration {2 * save} hangs: for 0.03 minutes {told}"
        assert SHORT_SECONDS <= seconds < 5 * SHORT_SECONDS


def test_a_slow_save_is_not_given_up_for_an_error_elsewhere(tmp_path):
    run = tiny_run(tmp_path, parallel=SHORT)
    waited = run_ranks(slow_in_a_save, 2, run, 2, 1, 1.5 * SHORT_SECONDS)
    assert all(seconds > SHORT_SECONDS for seconds in waited), waited
    assert [path.name for path in Path(run.checkpoint.save).glob("iter_*")] == ["iter_0000002"]


@pytest.mark.parametrize(("ckpt_format", "told"), [("torch", "none goes on from them"), ("dcp", "the same command")])
def test_a_stopped_run_says_whether_it_can_go_on(tmp_path, monkeypatch, capsys, ckpt_format, told):
    finish = step.finish_gradients
    monkeypatch.setattr(step, "finish_gradients", lambda *a: (finish(*a), os.kill(os.getpid(), signal.SIGTERM)))
    train(tiny_run(tmp_path, ckpt_format=ckpt_format), single_process())
    assert told in next(line for line in capsys.readouterr().out.splitlines() if "iteration 1 is the last" in line)


def test_a_run_of_which_nothing_is_left_says_so_and_where_its_weights_are(tmp_path, capsys):
    run = tiny_run(tmp_path)
    train(run, single_process())
    train(dataclasses.replace(run, train_iters=2), single_process())
    weights = Path(run.checkpoint.save, "iter_0000004")
    told = "nothing is left to train: 4 iterations are done, and 2 are asked for; their weights are in"
    assert f"{told} {weights}." in capsys.readouterr().out
