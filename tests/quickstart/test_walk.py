"""The walk's own commands: what they plan, and, two iterations long, that they fit together."""

import json
import os
import subprocess
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from examples.quickstart import walk
from examples.quickstart.steps import run_all
from examples.quickstart.summary import read_curve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def short_walk(tmp_path_factory):
    """The directory of a walk of two iterations of each kind, up to the checkpoint that goes back to Hugging Face."""
    out = tmp_path_factory.mktemp("walk") / "a place"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "PRETRAIN_ITERS": 2,
            "PRETRAIN_WARMUP": 0,
            "FINETUNE_ITERS": 2,
            "FINETUNE_WARMUP": 0,
        }.items():
            patch.setattr(walk, name, value)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.chdir(ROOT)
        run_all(takewhile(lambda step: step.title != "generate", walk.steps(out)), out / "log")
    return out


def test_the_final_checkpoint_loads_in_transformers_and_has_learned(short_walk):
    model = AutoModelForCausalLM.from_pretrained(short_walk / "final-hf")
    assert model.dtype == torch.float32 and model.config.sliding_window == 128
    before, after = (load_file(short_walk / name / "model.safetensors") for name in ("start-hf", "final-hf"))
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_losses_start_where_a_random_model_must_and_two_iterations_already_help(short_walk):
    first = read_curve(short_walk / "pretrain")
    assert first.validation[0][1] == pytest.approx(8.32, abs=0.1)  # ln 4096
    assert first.validation[-1][1] < first.validation[0][1]
    assert [iteration for iteration, _ in read_curve(short_walk / "finetune").training] == [1, 2]


def test_the_real_walk_plans_150_and_40_iterations_on_two_ranks(short_walk):
    planned = []
    for step in walk.steps(short_walk):
        if step.title in ("pre-train", "fine-tune"):
            environ = {**os.environ, **step.variables, "MP_DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": ""}
            output = subprocess.run(step.command, cwd=ROOT, env=environ, capture_output=True, check=True).stdout
            planned.append(json.loads(output))
    assert [plan["parallel"]["world"] for plan in planned] == [2, 2]
    assert [plan["schedule"]["train_iters"] for plan in planned] == [150, 40]
    assert [plan["schedule"]["lr_warmup_iters"] for plan in planned] == [10, 4]
