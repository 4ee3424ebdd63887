"""Launchers as people type them: `sh` is dash, the directory is another one, and paths hold spaces."""

import re
import shutil
import stat

import pytest
from commands import (
    CONVERSION,
    CONVERTER,
    MISTRAL,
    PREPROCESSING,
    PREPROCESSOR,
    PRETRAINING,
    RAW_FINE_TUNING,
    ROOT,
    SFT_PREPROCESSING,
    SFT_PREPROCESSOR,
    changed,
    through_shell,
)
from tiny import SCRIPTS as TRAINING_SCRIPTS
from tiny import script_of

from megatron_patch.launch.tables import LAUNCHERS

SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_documented_pretraining_is_planned(shell, tmp_path):
    status, plan, err = through_shell(shell, MISTRAL, PRETRAINING, tmp_path, MP_DRY_RUN="1")
    assert status == 0, err
    schedule = plan["schedule"]
    assert (schedule["train_iters"], schedule["lr_warmup_iters"], schedule["lr_decay_iters"]) == (9, 0, 9)
    assert plan["model"]["parameters"] == 7_241_732_096
    assert plan["command"][1:3] == ["-m", "megatron_patch.train.agent"]


def test_the_documented_raw_fine_tuning_is_planned(tmp_path):
    status, plan, err = through_shell("sh", MISTRAL, RAW_FINE_TUNING, tmp_path, MP_DRY_RUN="1", MP_DATASET_TYPE="raw")
    assert status == 0, err
    schedule = plan["schedule"]
    assert (schedule["train_iters"], schedule["lr_warmup_iters"], schedule["lr_decay_iters"]) == (10000, 100, 9900)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("script", "arguments"),
    [(CONVERTER, CONVERSION), (PREPROCESSOR, PREPROCESSING), (SFT_PREPROCESSOR, SFT_PREPROCESSING)],
    ids=["convert", "preprocess", "preprocess records"],
)
def test_the_documented_tools_are_planned(shell, script, arguments, tmp_path):
    status, plan, err = through_shell(shell, script, arguments, tmp_path, MP_DRY_RUN="1")
    assert status == 0, err
    assert {"arguments", "output", "command", "warnings"} <= set(plan)


def test_a_checkout_and_data_with_spaces_in_their_paths_work(tmp_path):
    linked = tmp_path / "a checkout with spaces"
    linked.symlink_to(ROOT)
    script = linked / MISTRAL.relative_to(ROOT)
    arguments = changed(PRETRAINING, OUTPUT_BASEPATH=f"{tmp_path}/out put; touch $(oops)")
    status, plan, err = through_shell("sh", script, arguments, tmp_path, MP_DRY_RUN="1")
    assert status == 0, err
    assert plan["arguments"]["OUTPUT_BASEPATH"] == f"{tmp_path}/out put; touch $(oops)"
    assert list(tmp_path.iterdir()) == [linked]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_wrong_count_is_refused_with_the_numbered_table(shell, tmp_path):
    status, out, err = through_shell(shell, MISTRAL, PRETRAINING[:-1], tmp_path)
    assert (status, out) == (2, "")
    assert "26 arguments are needed, 25 were given" in err
    assert "  26  OUTPUT_BASEPATH           (missing)" in err


def test_an_empty_argument_keeps_its_place(tmp_path):
    status, _, err = through_shell("sh", MISTRAL, changed(PRETRAINING, TP=""), tmp_path)
    assert status == 2
    assert "argument 10 (TP) is ''; allowed: a whole number ≥ 1" in err


@pytest.mark.parametrize("status", [0, 7])
def test_the_planned_commands_exit_status_is_the_launchers(tmp_path, status):
    """The launcher becomes the command: a stand-in for python3 shows what it is given, and answers with `status`."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(ROOT / "tests/golden/Mistral-7B-v0.1/config.json", source)
    package = tmp_path / "stand in" / "megatron_patch"
    shutil.copytree(ROOT / "megatron_patch", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "convert.py").write_text(f"import sys\nprint(sys.argv[1:])\nsys.exit({status})\n")
    script = tmp_path / "stand in" / CONVERTER.relative_to(ROOT)
    script.parent.mkdir(parents=True)
    shutil.copy(CONVERTER, script)
    arguments = ["7B", str(source), "", str(source), str(tmp_path / "target"), *CONVERSION[5:]]
    code, out, err = through_shell("sh", script, arguments, tmp_path)
    assert code == status, err
    assert str(source) in out
    assert "7,241,732,096" in err


SCRIPTS = [
    *(path for path in (ROOT / "examples").rglob("*.sh") if path.parent.name != "quickstart"),
    *(ROOT / "toolkits").rglob("*.sh"),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: f"{script.parent.name}/{script.name}")
def test_scripts_are_thin_posix_and_executable(script):
    """A few lines that become Python; those that people edit have variables before them, and flags behind."""
    text = script.read_text()
    code = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    assert text.startswith("#!/bin/sh\n") and code[0] == "set -eu"
    variables = [line for line in code[1:-3] if re.fullmatch(r'([A-Z_]+)="\$\{\1:-[^"$`]*\}"', line)]
    assert len(code) == 4 + len(variables)
    assert code[-1].startswith("exec python3 -m megatron_patch.launch ") and code[-1].endswith('"$@"')
    assert script.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("launcher", TRAINING_SCRIPTS)
def test_a_script_tells_its_arguments_in_their_order(launcher):
    header = script_of(launcher).read_text().partition("\nset -eu")[0]
    told = re.findall(r"(?<=[ #])(\d+) ([A-Z][A-Z_]+)\b", header)
    table = LAUNCHERS[launcher].tables[-1]
    assert told == [(str(number), arg.name) for number, arg in enumerate(table, 1)]
