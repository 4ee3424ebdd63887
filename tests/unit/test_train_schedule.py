"""The learning rate against Megatron-Core's OptimizerParamScheduler, whose values stand here as known answers."""

import pytest

from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.train.schedule import learning_rate


def rates(style, warmup, decay, count):
    config = OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=warmup, lr_decay_iters=decay, lr_decay_style=style)
    return [learning_rate(config, done) for done in range(count)]


def test_warm_up_starts_at_zero_and_reaches_the_peak():
    assert rates("cosine", 4, 8, 5) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_without_warm_up_the_first_step_has_the_peak():
    assert rates("cosine", 0, 8, 1) == [1.0]


def test_cosine_is_half_way_in_the_middle_and_stays_at_the_minimum():
    values = rates("cosine", 2, 10, 14)
    assert values[6] == pytest.approx(0.55)
    assert values[4] == pytest.approx(0.1 + 0.9 * (2**0.5 + 2) / 4)
    assert values[10:] == pytest.approx([0.1] * 4)


def test_linear_falls_evenly():
    assert rates("linear", 0, 4, 6) == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1, 0.1])


def test_constant_keeps_the_peak():
    assert rates("constant", 1, 4, 6) == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
