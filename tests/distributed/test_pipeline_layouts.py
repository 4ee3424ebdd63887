"""Layers over pipeline stages: the same loss, gradients and steps as one process, whatever a stage holds."""

import pytest
import torch

from layout_step import check_as_one_process
from layouts import trial
from pipeline_probe import TIMEOUT, probe
from ranks import run_ranks

FLOAT64 = {"steps": 3, "dtype": torch.float64}


@pytest.mark.parametrize(
    ("name", "world", "layout", "kind"),
    [
        ("qwen1_5 tied", 4, "pp4", {}),
        ("qwen1_5 tied", 2, "pp2 first1 layers5", FLOAT64),
        ("mistral", 2, "pp2 vp1", FLOAT64),
        ("qwen1_5 tied", 4, "tp2 sp pp2", {}),
        ("mistral", 4, "pp2 replicated", FLOAT64),
        ("mistral", 4, "pp2 vp1", FLOAT64),
    ],
)
def test_a_pipeline_has_the_loss_gradients_and_steps_of_one_process(name, world, layout, kind):
    check_as_one_process(trial(name, world, layout, **kind))


def test_a_stage_reduces_once_keeps_nothing_and_fails_in_time():
    for seen in run_ranks(probe, 4, trial("mistral", 4, "pp2 vp1")):
        before, after = seen.validations
        assert before == pytest.approx(after, rel=1e-7), "a validation after a step differs from the one before it"
        groups = 3  # of parameters in a rank's chunks: two layers, and what stands before the first or after the last
        assert seen.reductions == groups, "each is reduced once, after the last micro-batch"
        assert seen.kept == {"meta"}, "what was received is still held"
        is_last = seen.stage == 1
        assert isinstance(seen.error, ValueError if is_last else RuntimeError)
        assert ("third micro-batch" in str(seen.error)) == is_last
        assert seen.seconds < 3 * TIMEOUT
