"""The commands that the READMEs show."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """This checkout under a path with a space."""
    link = tmp_path_factory.mktemp("elsewhere") / "a checkout"
    link.symlink_to(ROOT, target_is_directory=True)
    return link


def test_both_languages_show_the_same_commands():
    assert len(BLOCKS) == 5
    assert FENCE.findall((ROOT / "README_zh-CN.md").read_text(encoding="utf-8")) == BLOCKS


def plan_of(block: str, shell: str, checkout: Path) -> dict:
    """What `block` prints on a dry run."""
    environ = {**os.environ, "MP_DRY_RUN": "1"}
    result = subprocess.run(
        [shell, "-euc", block], cwd=checkout, env=environ, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("shell", ["dash", "bash"])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_documented_command_can_be_planned(checkout, shell, block):
    assert plan_of(block, shell, checkout)["command"]


def test_the_documented_result_directory_is_the_one_that_the_run_writes(checkout):
    fine_tuning, back = (plan_of(block, "dash", checkout) for block in BLOCKS[3:])
    assert fine_tuning["output"]["checkpoint"] == back["arguments"]["SOURCE_CKPT_PATH"]
