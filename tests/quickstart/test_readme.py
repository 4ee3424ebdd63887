"""The commands that the READMEs show."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
READMES = [ROOT / "README.md", *sorted(ROOT.glob("examples/*/README.md"))]
BLOCKS = {
    f"{path.parent.name if path.parent != ROOT else 'walk'}-{number}": block
    for path in READMES
    for number, block in enumerate(FENCE.findall(path.read_text(encoding="utf-8")))
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """This checkout under a path with a space."""
    link = tmp_path_factory.mktemp("elsewhere") / "a checkout"
    link.symlink_to(ROOT, target_is_directory=True)
    return link


def test_every_family_has_its_readme():
    assert [path.parent.name for path in READMES[1:]] == ["deepseek_v2", "llama", "mistral", "mixtral", "qwen1_5"]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_both_languages_show_the_same_commands(readme):
    every_fence = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    ours, theirs = (
        every_fence.findall(path.read_text(encoding="utf-8")) for path in (readme, readme.with_stem("README_zh-CN"))
    )
    assert len(ours) > 4
    assert ours == theirs


def plan_of(block: str, shell: str, checkout: Path) -> dict:
    """What `block` prints on a dry run."""
    environ = {**os.environ, "MP_DRY_RUN": "1"}
    result = subprocess.run(
        [shell, "-euc", block], cwd=checkout, env=environ, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("shell", ["dash", "bash"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_documented_command_can_be_planned(checkout, shell, name):
    assert plan_of(BLOCKS[name], shell, checkout)["command"]


def test_the_documented_result_directory_is_the_one_that_the_run_writes(checkout):
    fine_tuning, back = (plan_of(block, "dash", checkout) for block in (BLOCKS["walk-3"], BLOCKS["walk-4"]))
    assert fine_tuning["output"]["checkpoint"] == back["arguments"]["SOURCE_CKPT_PATH"]
