"""Warnings about losses: when they come, and that an event brings one."""

import math

import pytest

from megatron_patch.train.watch import FEWEST, LossWatch, first_loss_warning, is_spike

QUIET = [2.0, 2.1] * 20  # mean 2.05, standard deviation 0.05


def warnings(losses):
    watch = LossWatch()
    return [number for number, loss in enumerate(losses) if watch.warning(loss)]


def test_loaded_weights_that_do_nothing_are_noticed():
    told = first_loss_warning(10.4, 32000)
    assert told and "10.373" in told and "vocabulary" in told and "rope theta" in told and "mask" in told
    assert "or above it" in first_loss_warning(12.0, 32000) and first_loss_warning(0.91 * math.log(32000), 32000)
    assert first_loss_warning(0.89 * math.log(32000), 32000) is None and first_loss_warning(2.0, 32000) is None


@pytest.mark.parametrize(("loss", "told"), [(2.34, False), (2.36, True), (1.0, False), (2.1, False)])
def test_a_spike_is_six_deviations_above_what_is_usual(loss, told):
    assert is_spike(QUIET, loss) is told


def test_a_spike_is_a_tenth_above_what_hardly_varies():
    assert not is_spike([2.0, 2.0001] * 20, 2.19) and is_spike([2.0, 2.0001] * 20, 2.21)


def test_few_losses_say_nothing():
    assert not is_spike([2.0] * (FEWEST - 1), 50.0) and is_spike([2.0] * FEWEST, 50.0)


def test_an_event_is_told_once_and_the_next_one_again():
    assert warnings([*QUIET, 5.0, 6.0, 4.0, 2.0, 5.0]) == [40, 44]


def test_a_jump_does_not_make_the_next_one_usual():
    assert warnings([*QUIET, 50.0, 2.0, 4.0]) == [40, 42]


def test_a_new_level_becomes_usual():
    assert warnings([*QUIET, *[4.0, 4.1] * 20, 8.0]) == [40, 80]


def test_what_is_not_finite_is_no_event_and_no_habit():
    assert warnings([*QUIET, math.nan, math.inf, 2.0, 5.0]) == [43]


def test_a_falling_loss_is_no_event():
    assert warnings([10.0 * 0.97**step + 1 for step in range(200)]) == []
