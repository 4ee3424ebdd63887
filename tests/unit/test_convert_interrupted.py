"""A conversion that fails, is killed or is interrupted: what stood in the target stands there still."""

import contextlib
import errno
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conversions import assert_equal_tensors, run, tensors_of, write_source
from tiny_checkpoint import hf_tensors

from megatron_patch.checkpoint.atomic import replaced_directory


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "hf")


def test_a_full_disk_leaves_a_clear_error_and_no_partial_target(source, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert run(source, tmp_path / "out", "--format", "mcore") == 1
    assert "writing stopped: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


SLOW = """
import os, runpy, sys, time
real = os.pwrite
os.pwrite = lambda *arguments: (time.sleep(0.3), real(*arguments))[1]
runpy.run_module("megatron_patch.convert", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def half_way(source, tmp_path):
    """A conversion to `out`, a while before its end."""
    command = [sys.executable, "-c", SLOW, source, tmp_path / "out", "--format", "mcore"]
    process = subprocess.Popen(  # what a shell starts in the background ignores SIGINT, and so would its children
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.partial/release/*/*")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended or never began"
        time.sleep(0.02)
    assert not (tmp_path / "out").exists()
    yield process
    process.kill()
    process.communicate()


def test_a_killed_conversion_shows_nothing_and_can_be_started_again(source, tmp_path, half_way):
    half_way.kill()
    half_way.wait()
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.*.partial"))
    assert run(source, tmp_path / "out", "--format", "mcore", "--verify") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_conversion_that_is_still_running_is_left_alone(source, tmp_path, half_way):
    assert run(source, tmp_path / "out", "--format", "hf") == 0
    assert half_way.poll() is None and list(tmp_path.glob(".out.*.partial/release/*/*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_cleans_up(tmp_path, half_way, number, status):
    half_way.send_signal(number)
    assert half_way.wait(timeout=60) == status
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert "Traceback" not in half_way.stderr.read()


def test_one_killed_between_two_renames_gives_back_what_stood_there(source, tmp_path):
    run(source, tmp_path / "out", "--format", "mcore")
    (tmp_path / "out").rename(tmp_path / ".out.0123abcd.old")
    assert run(source, tmp_path / "out", "--format", "hf", "--model-size", "7B") == 1
    assert not (tmp_path / "out").exists(), "refused before anything is touched"
    with replaced_directory(tmp_path / "other"):
        assert (tmp_path / ".out.0123abcd.old").exists(), "another target's"
    with contextlib.suppress(ZeroDivisionError), replaced_directory(tmp_path / "out"):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "release").is_dir()


def test_overwrite_replaces_the_whole_checkpoint(source, tmp_path):
    target = tmp_path / "out"
    assert run(source, target, "--format", "mcore", "--tp", 2) == 0
    assert run(source, target, "--format", "hf", "--overwrite") == 0
    assert not (target / "release").exists() and (target / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~_umask()


def test_a_linked_target_stays_a_link(source, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert run(source, tmp_path / "link", "--format", "hf") == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "model.safetensors").is_file()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("message", ["tp 3", "truncated"])
def test_a_failed_conversion_keeps_what_stood_in_the_target(source, tmp_path, capsys, message):
    run(source, tmp_path / "out", "--format", "mcore")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    if message == "truncated":
        weights = source / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    tp = 3 if message == "tp 3" else 1
    assert run(source, tmp_path / "out", "--format", "mcore", "--tp", tp, "--overwrite") == 1
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_an_interrupted_conversion_says_so_and_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_patch.convert.copy_assets", interrupted)
    assert run(source, tmp_path / "out", "--format", "mcore") == 130
    assert capsys.readouterr().err == f"convert: interrupted; {tmp_path / 'out'} is as it was\n"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_others_put_into_the_target_meanwhile_is_kept(source, tmp_path, capsys, monkeypatch):
    def written_by_another(directory, dtype):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years")

    monkeypatch.setattr("megatron_patch.convert.write_dtype", written_by_another)
    assert run(source, tmp_path / "out", "--format", "mcore") == 1
    assert "is not empty; choose another directory" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("moved", [1, 2])
def test_an_interruption_of_the_replacement_itself_loses_nothing(source, tmp_path, capsys, monkeypatch, moved):
    """Ctrl-C right after the first rename, and after the second."""
    run(source, tmp_path / "out", "--format", "hf")
    real, count = Path.rename, itertools.count(1)

    def rename(path, target):
        real(path, target)
        if next(count) == moved:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", rename)
    assert run(source, tmp_path / "out", "--format", "mcore", "--overwrite") == 130
    assert (tmp_path / "out" / "release").exists() == (moved == 2)
    assert ("was replaced already and is complete" if moved == 2 else "is as it was") in capsys.readouterr().err
    assert run(source, tmp_path / "out", "--format", "hf", "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("format", ["hf", "mcore", "torch_dist"])
def test_a_source_that_is_deleted_meanwhile_is_converted_or_named(source, tmp_path, capsys, monkeypatch, format):
    run(source, tmp_path / "src", "--format", format)
    real = os.pwrite

    def delete_and_write(*arguments):
        shutil.rmtree(tmp_path / "src", ignore_errors=True)
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", delete_and_write)
    status = run(tmp_path / "src", tmp_path / "out", "--format", "mcore")
    error = capsys.readouterr().err
    monkeypatch.undo()
    if status:
        assert str(tmp_path / "src") in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    else:
        run(tmp_path / "out", tmp_path / "back", "--format", "hf")
        assert_equal_tensors(tensors_of(tmp_path / "back"), hf_tensors())
