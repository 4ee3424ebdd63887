"""What docs/commands.md promises: a test for every command of the documents, and every launcher among its commands."""

import re
from pathlib import Path

import pytest
from commands import ROOT

TEXT = (ROOT / "docs/commands.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT[TEXT.index("| document | command | here | test |") :].splitlines()[2:]
    if line.startswith("|")
]


@pytest.mark.parametrize("row", ROWS, ids=[row[1] for row in ROWS])
def test_the_test_of_a_documented_command_exists(row):
    _, _, _, reference = row
    file, name = re.fullmatch(r"`(.+\.py)::(test_\w+)`", reference).groups()
    assert f"def {name}(" in (ROOT / "tests" / file).read_text()


def test_every_document_has_its_rows():
    documents = [row[0] for row in ROWS]
    assert {name: documents.count(name) for name in dict.fromkeys(documents)} == {
        "Pai-Megatron-Patch, Mistral": 7,
        "Pai-Megatron-Patch, DeepSeek-V2": 7,
        "Pai-Megatron-Patch, Qwen1.5 and LLaMA": 5,
        "ModelLink, Mistral-7B-32K": 8,
        "Mixtral-Train": 4,
    }


def test_every_launcher_is_among_the_commands():
    scripts = {path.name for path in Path(ROOT / "examples").rglob("*.sh") if path.parent.name != "quickstart"}
    blocks = "".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL))
    assert not {name for name in scripts if name not in blocks}
