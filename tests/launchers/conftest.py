"""Launchers in process: a clean environment, and nothing can really start."""

import json
import os
from collections.abc import Callable

import pytest
from commands import StartedError, clean_environment

from megatron_patch.launch.__main__ import main


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No variable that a launcher reads, another directory, and `execv` as an error that the test sees."""

    def execv(path, argv):
        raise StartedError(argv)

    monkeypatch.setattr("os.environ", os.environ.copy())
    for name in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(name)
    monkeypatch.setattr("os.execv", execv)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys) -> Callable[[str, list[str]], str]:
    """Run a launcher; its one message, having exited with 2 and printed nothing to standard output."""

    def run(launcher: str, arguments: list[str]) -> str:
        status = main([launcher, *arguments])
        captured = capsys.readouterr()
        assert (status, captured.out) == (2, "")
        return captured.err

    return run


@pytest.fixture
def planned(capsys, monkeypatch) -> Callable[[str, list[str]], dict]:
    """Run a launcher dry; its plan."""
    monkeypatch.setenv("MP_DRY_RUN", "1")

    def run(launcher: str, arguments: list[str]) -> dict:
        status = main([launcher, *arguments])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return json.loads(captured.out)

    return run
