"""The plan's estimate of memory beside what a rank really holds; `benchmarks/memory_estimate.py` has more cases."""

import dataclasses
import sys
from pathlib import Path

import pytest

from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.plan.memory import memory

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from memory_estimate import DENSE, Case, measure, run_of


def test_a_cpu_rank_holds_what_the_plan_says(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    case = Case("mistral", dataclasses.replace(DENSE, num_layers=2, vocab_size=16000), length=256)  # 0.26 GB of weights
    run = run_of(case, tmp_path)
    estimated = memory(run, manifest(ALL[case.family], case.model), case.grid, on_cpu=True)["total"]
    (measured,) = measure(run, case.world, str(tmp_path))
    assert estimated == pytest.approx(measured, rel=0.2)
