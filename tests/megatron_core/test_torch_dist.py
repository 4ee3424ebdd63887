"""Megatron-Core reads the distributed checkpoints that we write, and we read those that it writes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file

from megatron_patch import convert

READER = Path(__file__).with_name("torch_dist_reader.py")
TIMEOUT = 300
CASES = [  # family, Megatron's layout, whether it then writes every layer, expert and half under its own name
    ("Mistral", {}, True),
    ("LLaMA 3.1", {"tensor": 2}, False),
    ("Qwen1.5, tied", {"tensor": 2, "pipeline": 2}, False),
    ("Mixtral", {"tensor": 2, "expert": 2}, True),
    ("Qwen1.5-MoE", {}, False),
    ("DeepSeek-V2-Lite", {}, True),
    ("DeepSeek-V2", {"tensor": 2, "expert": 2}, False),
]
IDS = [f"{family} {layout}" for family, layout, _ in CASES]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Family → its Hugging Face directory and transformers' logits."""
    root = tmp_path_factory.mktemp("sources")
    return {family: (root / family, oracle.write_source(family, root / family)) for family in {c[0] for c in CASES}}


@pytest.fixture(scope="module")
def visited(sources, tmp_path_factory):
    """One directory per case: `ours` is what we wrote, `theirs` what Megatron-Core wrote after reading it."""
    root = tmp_path_factory.mktemp("torch_dist")
    cases = []
    for number, (family, layout, is_singleton) in enumerate(CASES):
        work, source = root / str(number), sources[family][0]
        command = [str(source), str(work / "ours"), "--format", "torch_dist", "--transformer-impl", "local"]
        assert convert.main(command) == 0
        sizes = {f"{axis}_model_parallel_size": size for axis, size in layout.items()}
        case = {"root": work / "ours", "tokens": source / "tokens.pt", "out": work / "logits", "save": work / "theirs"}
        cases.append(
            {name: str(path) for name, path in case.items()}
            | {
                "singleton": is_singleton,
                "layout": sizes | {"expert_tensor_parallel_size": 1, "padded_vocab_size": 102},
            }
        )
    (root / "cases.json").write_text(json.dumps(cases))
    with (root / "log").open("w") as log:  # a pipe would stay open as long as any process that Megatron-Core forks
        command = [sys.executable, READER, root / "cases.json"]
        reader = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = reader.wait(TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(reader.pid, signal.SIGKILL)  # Megatron-Core's writers outlive it
    assert status == 0, (root / "log").read_text()[-2000:]
    return root


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_megatron_core_computes_transformers_logits(sources, visited, number):
    work, error = visited / str(number), visited / str(number) / "logits.error"
    assert not error.exists(), error.read_text()
    logits = torch.load(work / "logits")[..., : oracle.VOCABULARY]
    assert (logits - sources[CASES[number][0]][1]).abs().max() <= 1e-5


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_what_megatron_core_writes_comes_back_bit_for_bit(sources, visited, number):
    source, work = sources[CASES[number][0]][0], visited / str(number)
    command = [str(work / "theirs"), str(work / "back"), "--format", "hf", "--assets", str(source)]
    assert convert.main(command) == 0
    wanted, found = (load_file(directory / "model.safetensors") for directory in (source, work / "back"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
