"""A whole run in one process, stopped and launched again: what it continues, what it refuses, and what faults leave."""

import dataclasses
import json
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from tiny_training import ENTRIES, MODEL, iterations_saved, lines, tiny_run

from megatron_patch.checkpoint.atomic import claimed_directory
from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.families.mistral import MISTRAL
from megatron_patch.parallel.mesh import single_process
from megatron_patch.plan.start import recorded_iterations, resolve_start
from megatron_patch.train import save
from megatron_patch.train.loop import train

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def run(tmp_path, tokenizer_directory):
    return tiny_run(tmp_path, tokenizer_directory)


def changed(run, *, data=None, **checkpoint):
    """The run with other settings of its checkpoints and data."""
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, **checkpoint))
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **data or {}))


def root_of(run):
    return Path(run.checkpoint.save)


def iteration(run, number):
    return root_of(run) / f"iter_{number:07d}"


def stop_after(run, number):
    """Leave a finished run's output as if it had been killed while it saved the iteration after `number`."""
    for later in range(number + 1, run.train_iters + 1):
        shutil.rmtree(iteration(run, later))
    partial = root_of(run) / f".iter_{number + 1:07d}.partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"half")
    (root_of(run) / TRACKER).write_text(str(number))


def weights(run, number):
    (root_of(run) / TRACKER).write_text(str(number))
    source = open_checkpoint(root_of(run), MISTRAL, MODEL)
    return {entry.mcore: source.read(entry).clone() for entry in ENTRIES}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def timeless(rows):
    names = ("iteration", "lm loss", "grad norm")
    return [{name: value for name, value in row.items() if name in names} for row in rows]


def test_relaunching_the_same_command_continues_bit_for_bit(run, capsys):
    run = dataclasses.replace(run, eval_interval=2)
    train(run, single_process())
    whole, final = lines(run), weights(run, 4)
    assert f"a new run: {run.checkpoint.save} holds none of its checkpoints" in capsys.readouterr().out
    stop_after(run, 2)
    with Path(run.log_file).open("a") as log:
        log.write('{"iteration": 5, "lm lo')  # what the kill cut off
    train(run, single_process())
    said = capsys.readouterr().out
    assert f"continued from iteration 2, this run's own last checkpoint in {run.checkpoint.save}" in said
    assert "starting from" not in said and "changed since" not in said
    assert timeless(lines(run)) == timeless(whole) and len(lines(run)) == 5
    assert same(weights(run, 4), final)
    assert not list(root_of(run).glob(".*")), "leftovers"


def test_a_finished_run_has_nothing_left_to_train(run):
    train(run, single_process())
    before = lines(run)
    train(run, single_process())
    assert lines(run) == before


def test_a_save_beside_training_is_the_save_that_training_waits_for(run, monkeypatch):
    train(changed(run, async_save=False), single_process())
    waited = [weights(run, number) for number in (1, 2, 3, 4)]
    files = [json.loads((iteration(run, n) / "run.json").read_text())["files"] for n in (1, 2, 3, 4)]
    shutil.rmtree(root_of(run))
    steps_beside = []
    beside = threading.Event()
    real_write, real_wait = save.write_boxes, save.Saver.wait

    def late(directory, boxes, progress):
        """Write only when the loop is back, after a step, to save again or to end."""
        before = [box.values.clone() for box in boxes]
        assert beside.wait(20)
        steps_beside.append(all(torch.equal(b.values, c) for b, c in zip(boxes, before, strict=True)))
        real_write(directory, boxes, progress)

    def wait(saver):
        beside.set()
        real_wait(saver)
        beside.clear()

    monkeypatch.setattr(save, "write_boxes", late)
    monkeypatch.setattr(save.Saver, "wait", wait)
    train(run, single_process())
    assert steps_beside == [True] * 4
    assert all(same(weights(run, n), waited[n - 1]) for n in (1, 2, 3, 4))
    crc = [json.loads((iteration(run, n) / "run.json").read_text())["files"] for n in (1, 2, 3, 4)]
    assert [f["__0_0.distcp"] for f in crc] == [f["__0_0.distcp"] for f in files]


@pytest.mark.parametrize(
    ("differ", "told"),
    [
        (lambda run: changed(run, data={"seed": 7}), "seed: 1234 in the recorded run, 7 in this one"),
        (lambda run: changed(run, load="elsewhere"), "start weights: none in the recorded run, elsewhere in this one"),
        (lambda run: changed(run, data={"dataset": "JSON-SFT"}), "dataset: MMAP in the recorded run, JSON-SFT in this"),
        (lambda run: changed(run, data={"train_data_path": ("a", "b")}), "data in the recorded run, a b in this one"),
        (lambda run: dataclasses.replace(run, global_batch_size=8), "global_batch_size: 4 in the recorded run, 8 in"),
        (
            lambda run: dataclasses.replace(run, model=dataclasses.replace(run.model, rotary_base=5e5)),
            "rotary_base: 10000.0 in the recorded run, 500000.0 in this one",
        ),
    ],
)
def test_another_run_is_refused_with_what_differs(run, differ, told):
    train(dataclasses.replace(run, train_iters=1), single_process())
    other = differ(run)
    with pytest.raises(FileExistsError, match=f"another run; pass --overwrite .*:\n  (.*\n)*.*{told}"):
        resolve_start(other)
    elsewhere = changed(other, save=run.checkpoint.save + "2", resume=run.checkpoint.save)
    with pytest.raises(ValueError, match=rf"--resume .* is of another run:\n  (.*\n)*.*{told}"):
        resolve_start(elsewhere)
    assert not resolve_start(changed(other, overwrite=True)).candidates


def test_a_replaced_run_is_deleted_only_when_there_is_another(run, monkeypatch):
    train(run, single_process())
    other = changed(dataclasses.replace(run, train_iters=2), data={"seed": 7}, overwrite=True, save_interval=2)
    real, seen = save.write_boxes, []
    monkeypatch.setattr(save, "write_boxes", lambda *given: (seen.append(iterations_saved(run)), real(*given)))
    train(other, single_process())
    assert seen == [[1, 2, 3, 4]] and iterations_saved(run) == [2]
    assert recorded_iterations(root_of(run))[0].run["data"]["seed"] == 7


def test_never_starts_anew_where_nothing_stands_or_may_be_replaced(run, capsys):
    train(dataclasses.replace(run, train_iters=1), single_process())
    with pytest.raises(FileExistsError, match="already holds checkpoints, and --resume is never; pass --overwrite"):
        train(changed(run, resume="never"), single_process())
    capsys.readouterr()
    train(changed(run, resume="never", overwrite=True), single_process())
    assert "a new run: --resume is never" in capsys.readouterr().out
    assert [line["iteration"] for line in lines(run)] == [0, 1, 2, 3, 4]


def test_another_runs_checkpoint_is_resumed_for_longer_and_then_continues_its_own(run, tmp_path, capsys):
    train(dataclasses.replace(run, train_iters=2), single_process())
    resuming = changed(run, save=str(tmp_path / "longer"), resume=run.checkpoint.save)
    resuming = dataclasses.replace(resuming, log_file=str(tmp_path / "longer.jsonl"))
    train(dataclasses.replace(resuming, train_iters=3), single_process())
    said = capsys.readouterr().out
    assert f"resumed from iteration 2 in {iteration(run, 2)}: --resume names it" in said
    assert "changed since: train_iters 2 → 3" in said
    assert [line["iteration"] for line in lines(resuming)] == [3] and iterations_saved(resuming) == [3]
    train(resuming, single_process())
    assert "continued from iteration 3, this run's own" in capsys.readouterr().out
    assert [line["iteration"] for line in lines(resuming)] == [3, 4]
    one = changed(run, save=str(tmp_path / "one"), resume=str(iteration(run, 1)))
    assert resolve_start(one).candidates[0].iteration == 1


def test_resuming_what_is_not_there_is_an_error(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to continue"):
        train(changed(run, resume=str(tmp_path / "absent")), single_process())
    assert not root_of(run).exists()


def harm(run, number, name="__0_0.distcp"):
    path = iteration(run, number) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", "run.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used_when_allowed(run, name, capsys):
    train(dataclasses.replace(run, train_iters=3), single_process())
    if name == "run.json":
        (iteration(run, 3) / name).write_text('{"iteration": 3')
    else:
        harm(run, 3)
    with pytest.raises(ValueError, match=rf"iter_0000003/{name} is damaged.*--resume-previous continues"):
        train(run, single_process())
    train(changed(run, resume_previous=True), single_process())
    said = capsys.readouterr().out
    assert "continued from iteration 2" in said and iterations_saved(run) == [1, 2, 3, 4]
    assert [line["iteration"] for line in lines(run)] == [0, 1, 2, 3, 4]
    for number in (1, 2, 3, 4):
        harm(run, number)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        train(changed(run, resume_previous=True), single_process())


def test_without_a_tracker_the_last_complete_iteration_is_continued(run):
    train(dataclasses.replace(run, train_iters=2), single_process())
    (root_of(run) / TRACKER).unlink()
    assert resolve_start(run).candidates[0].iteration == 2


def test_a_full_disk_during_a_save_is_said_and_the_run_goes_on(run, capsys, monkeypatch):
    limits, real = resource.getrlimit(resource.RLIMIT_FSIZE), save.write_boxes

    def full(directory, boxes, progress):
        if "0000002" in directory.name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            real(directory, boxes, progress)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(save, "write_boxes", full)
    train(changed(run, async_save=False), single_process())
    said = capsys.readouterr().out
    assert "the checkpoint of iteration 2 was NOT saved: [Errno 27] rank 0: File too large" in said
    assert iterations_saved(run) == [1, 3, 4] and not list(root_of(run).glob(".*"))


def test_the_last_save_must_not_fail_in_silence(run, monkeypatch):
    def full(directory, boxes, progress):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_boxes", full)
    with pytest.raises(OSError, match=r"the last checkpoint could not be saved: .*No space left"):
        train(run, single_process())


def test_only_the_last_checkpoints_are_kept(run):
    train(changed(run, keep_last=2), single_process())
    assert iterations_saved(run) == [3, 4]


def test_two_runs_do_not_write_to_one_directory(run):
    with claimed_directory(root_of(run)), pytest.raises(FileExistsError, match="another run writes to"):
        train(run, single_process())


def test_tensorboard_goes_on_in_the_directory_of_the_first_launch(run, tmp_path):
    run = dataclasses.replace(run, tensorboard_dir=str(tmp_path / "events_at_noon"))
    train(dataclasses.replace(run, train_iters=2), single_process())
    train(dataclasses.replace(run, tensorboard_dir=str(tmp_path / "events_at_two")), single_process())
    assert len(list((tmp_path / "events_at_noon").iterdir())) == 2 and not (tmp_path / "events_at_two").exists()


def test_own_checkpoints_serve_as_start_weights(run, tmp_path, capsys):
    train(dataclasses.replace(run, train_iters=2), single_process())
    trained = weights(run, 2)
    other = changed(run, load=run.checkpoint.save, save=str(tmp_path / "next"))
    still = dataclasses.replace(other.optimizer, lr=0.0, min_lr=0.0)
    train(dataclasses.replace(other, optimizer=still, train_iters=1), single_process())
    assert f"starting from dcp iter_0000002 in {run.checkpoint.save}, with a new optimizer" in capsys.readouterr().out
    assert same(weights(other, 1), trained)
    harm(run, 2)
    with pytest.raises(ValueError, match=r"iter_0000002/__0_0.distcp is damaged.*start from an earlier iteration"):
        train(changed(other, save=str(tmp_path / "third")), single_process())
