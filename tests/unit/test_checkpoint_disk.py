"""Disks that are full, or that this user may not touch, end in one sentence that names the file."""

import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from layouts_of_mcore import CONFIGS, ENTRIES, RandomSource
from tiny_checkpoint import hf_tensors, write_directory

from megatron_patch import convert
from megatron_patch.checkpoint.formats import FORMATS
from megatron_patch.checkpoint.interface import Target


@contextmanager
def files_of_at_most(size):
    """A write beyond `size` fails as on a full disk; the limit is this process's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def as_nobody():
    """Without the rights of root, if this process has them."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("size", [100, 700, 3000, 20_000])  # in a skeleton, a header, an index, and a tensor
@pytest.mark.parametrize("format", ["mcore", "torch_dist", "megatron"])
def test_a_disk_that_is_full_while_a_file_is_laid_out_is_told_with_the_file(tmp_path, format, size):
    source = RandomSource("mistral")
    with files_of_at_most(size), pytest.raises(OSError, match=r"File too large: .*/release/"):
        FORMATS[format].write(tmp_path, ENTRIES["mistral"], CONFIGS["mistral"], source, Target())


def test_a_full_disk_ends_the_command_in_one_line_and_leaves_nothing(tmp_path, capsys):
    write_directory(tmp_path / "hf", hf_tensors())
    for format in ("mcore", "torch_dist"):
        with files_of_at_most(2000):
            assert convert.main([str(tmp_path / "hf"), str(tmp_path / "out"), "--format", format]) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and told.endswith(": File too large\n") and "/release/" in told
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_directory_of_somebody_else_is_told_before_anything_is_read(tmp_path, capsys, monkeypatch):
    source = write_directory(tmp_path / "hf", hf_tensors())
    assert convert.main([str(source), str(tmp_path / "mcore"), "--format", "mcore"]) == 0
    allowed = os.access
    for theirs, target, options, told in (
        (tmp_path, "out", [], f"out cannot be written: no permission in {tmp_path}"),
        (tmp_path, "deep/er", [], f"er cannot be written: no permission in {tmp_path}"),
        (tmp_path / "mcore/release", "mcore", ["--overwrite"], "mcore cannot be replaced: no permission in"),
    ):
        monkeypatch.setattr(os, "access", lambda path, *how, not_in=theirs: path != not_in and allowed(path, *how))
        with pytest.raises(SystemExit):
            convert.main([str(source), str(tmp_path / target), "--format", "mcore", *options])
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("format", "file", "told"),
    [
        ("mcore", "release/mp_rank_00/model_optim_rng.pt", "model_optim_rng.pt: Permission denied"),
        ("mcore", "release/mp_rank_00", "model_optim_rng.pt: Permission denied"),
        ("mcore", "release", "release/.metadata: Permission denied"),
        ("mcore", "latest_checkpointed_iteration.txt", "latest_checkpointed_iteration.txt: Permission denied"),
        ("torch_dist", "release/.metadata", ".metadata: Permission denied"),
        ("torch_dist", "release/__0_0.distcp", "__0_0.distcp: Permission denied"),
    ],
)
def test_what_this_user_may_not_read_is_not_called_damaged_or_absent(format, file, told, capsys):
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies where nobody but its owner may go
        directory = Path(name)
        directory.chmod(0o777)
        source = write_directory(directory / "hf", hf_tensors())
        assert convert.main([str(source), str(directory / "theirs"), "--format", format]) == 0
        (directory / "theirs" / file).chmod(0)
        with as_nobody():
            assert convert.main([str(directory / "theirs"), str(directory / "out"), "--format", "hf"]) == 1
        (directory / "theirs" / file).chmod(0o700)
    assert told in capsys.readouterr().err
