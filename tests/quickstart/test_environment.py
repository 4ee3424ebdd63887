"""The preparation that both commands share."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def prepare(root: Path, path: str, **variables: str) -> subprocess.CompletedProcess:
    """Source environment.sh under dash with nothing but `path` and `variables` in the environment."""
    script = 'root=$1; . "$root/examples/quickstart/environment.sh"; python3 -c "import sys; print(sys.prefix)"'
    command = ["/usr/bin/env", "-i", f"PATH={path}", *(f"{k}={v}" for k, v in variables.items())]
    return subprocess.run(
        [*command, shutil.which("dash"), "-euc", script, "dash", str(root)], capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a space in its path and no requirements."""
    root = tmp_path / "a checkout"
    (root / "examples" / "quickstart").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "quickstart" / "environment.sh", root / "examples" / "quickstart")
    (root / "requirements.txt").write_text("")
    return root


def command(directory: Path, name: str, text: str) -> Path:
    """An executable shell script."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return directory


def test_without_a_recent_python_one_sentence_says_so(checkout, tmp_path):
    result = prepare(checkout, str(command(tmp_path / "bin", "python3", "exit 1")))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: no Python 3.10 or newer on PATH")


def test_without_the_venv_module_one_sentence_names_the_package(checkout, tmp_path):
    stub = command(tmp_path / "bin", "python3", 'case "$*" in *ensurepip*) exit 1 ;; esac')
    result = prepare(checkout, str(stub))
    assert result.returncode == 1
    assert "apt install python3-venv" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_virtual_environment_is_made_once_and_nothing_is_installed_twice(checkout, tmp_path):
    python = command(tmp_path / "bin", "python3", f'exec {sys._base_executable} "$@"')
    first = prepare(checkout, f"{python}:/usr/bin:/bin")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == str(checkout / ".venv")
    assert "installing" in first.stdout
    second = prepare(checkout, f"{python}:/usr/bin:/bin")
    assert second.stdout == f"{checkout / '.venv'}\n"
