"""Megatron-Core reads what the converter wrote, in processes of its own; every layout is in docs/oracle_table.md."""

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch

from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.placement import stage_ranges

TIMEOUT = 300
LOCAL = functools.partial(Target, transformer_impl="local")
CASES = [
    ("Mistral", LOCAL()),
    ("Mistral", LOCAL(tp=2, pp=2, first_stage_layers=1)),
    ("LLaMA 3.1", LOCAL(tp=4)),
    ("Qwen1.5", LOCAL(tp=2)),
    ("Qwen1.5, tied", LOCAL(tp=2, pp=2, vp=2)),
    ("Mixtral", LOCAL(tp=2, ep=2)),
    ("Mixtral", LOCAL(tp=2, pp=2, ep=4, etp=1)),
    ("Qwen1.5-MoE", LOCAL(pp=2, ep=2)),
    ("DeepSeek-V2-Lite", LOCAL(tp=2, ep=2)),
    ("DeepSeek-V2", LOCAL(tp=2, pp=2, first_stage_layers=1, ep=2)),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Family → its Hugging Face directory and transformers' logits."""
    root = tmp_path_factory.mktemp("sources")
    families = dict.fromkeys(family for family, _ in CASES)
    return {family: (root / family, oracle.write_source(family, root / family)) for family in families}


@pytest.fixture(scope="module")
def read(sources, tmp_path_factory):
    """Megatron-Core's logits of every case, in order, or what it raised."""
    root = tmp_path_factory.mktemp("mcore")
    for number, (family, layout) in enumerate(CASES):
        oracle.write_layout(sources[family][0], root / str(number), layout)
    tokens = [sources[family][0] / "tokens.pt" for family, _ in CASES]
    return oracle.logits([(root / str(n), file) for n, file in enumerate(tokens)], TIMEOUT)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]} {oracle.phrase(CASES[n][1])}")
def test_megatron_core_computes_transformers_logits(sources, read, number):
    family, layout = CASES[number]
    wanted, found = sources[family][1], read[number]
    assert isinstance(found, torch.Tensor), found
    assert found.shape[-1] == -(-oracle.VOCABULARY // layout.tp) * layout.tp
    assert (found[..., : oracle.VOCABULARY] - wanted).abs().max() <= 1e-5


def test_the_window_shows_in_the_logits(sources):
    directory, logits = sources["Mistral"]
    assert (oracle.without_window(directory) - logits).abs().max() > 0.1


def test_megatron_core_divides_layers_as_we_do(tmp_path):
    cases = [
        (layers, pp, vp, first)
        for layers, pp, vp in itertools.product(range(1, 13), range(2, 5), range(1, 4))
        for first in (None, *range(1, layers))
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("layer_ranges.py")
    output = subprocess.run(
        [sys.executable, script, tmp_path / "cases.json"], capture_output=True, text=True, timeout=TIMEOUT, check=True
    ).stdout
    theirs = json.loads(output.splitlines()[-1])
    divided = 0
    for (layers, pp, vp, first), expected in zip(cases, theirs, strict=True):
        try:
            ours = stage_ranges(layers, Target(pp=pp, vp=vp, first_stage_layers=first))
        except ValueError:
            assert expected is None or any(count == 0 for stage in expected for _, count in stage)
            continue
        divided += 1
        assert [[[chunk.start, len(chunk)] for chunk in stage] for stage in ours] == expected
    assert divided > 100
