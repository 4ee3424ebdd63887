"""The order of blends: equal to the definition it replaces, step by step, whatever was guessed on the way."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_patch.data import blend_order
from megatron_patch.data.blend_order import blend_indices


def one_after_another(weights, size):
    """Megatron's definition as a loop."""
    given, order = np.zeros(len(weights)), []
    for step in range(size):
        chosen = int((np.asarray(weights) * max(step, 1) - given).argmax())
        order.append((chosen, int(given[chosen])))
        given[chosen] += 1
    return order


def normal(weights):
    return np.asarray(weights, np.float64) / sum(weights)


@pytest.mark.parametrize("lead", [0, 1, 16])
@pytest.mark.parametrize(
    "weights",
    [[1], [1, 1], [0.7, 0.2, 0.1], [1] * 7, [1, 1e-4, 2e-4, 3], [0, 1], np.random.RandomState(0).dirichlet([0.4] * 12)],
    ids=str,
)
def test_lanes_are_the_loop_whatever_they_start_from(weights, lead, monkeypatch):
    for name, value in {"LANES": 5, "LANE_LENGTH": 40, "LEAD_PER_DATASET": 0, "LEAD": lead}.items():
        monkeypatch.setattr(blend_order, name, value)
    weights = normal(weights)
    datasets, numbers = blend_indices(weights, 1037)
    assert list(zip(datasets.tolist(), numbers.tolist(), strict=True)) == one_after_another(weights, 1037)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=st.lists(st.integers(1, 9) | st.floats(1e-6, 1), min_size=1, max_size=300),
    lanes=st.integers(1, 50),
    size=st.integers(1, 400),
)
def test_any_weights_give_the_order_of_the_loop(weights, lanes, size, monkeypatch):
    for name, value in {"LANES": lanes, "LANE_LENGTH": 30, "LEAD_PER_DATASET": 0, "LEAD": 4}.items():
        monkeypatch.setattr(blend_order, name, value)
    datasets, numbers = blend_indices(normal(weights), size)
    assert list(zip(datasets.tolist(), numbers.tolist(), strict=True)) == one_after_another(normal(weights), size)


def test_wrong_guesses_change_nothing(monkeypatch):
    weights = normal([5, 3, 2, 1])
    for name, value in {"LANES": 4, "LANE_LENGTH": 30, "LEAD_PER_DATASET": 0, "LEAD": 0}.items():
        monkeypatch.setattr(blend_order, name, value)
    wanted = blend_indices(weights, 500)
    monkeypatch.setattr(blend_order, "_guess", lambda weights, steps: np.full((len(weights), len(steps)), 9.0))
    for ours, theirs in zip(blend_indices(weights, 500), wanted, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("size", [0, 1, 2, 39, 40, 41, 200, 201])
def test_every_size_is_a_beginning_of_the_same_order(size, monkeypatch):
    for name, value in {"LANES": 5, "LANE_LENGTH": 40, "LEAD_PER_DATASET": 0, "LEAD": 8}.items():
        monkeypatch.setattr(blend_order, name, value)
    datasets, numbers = blend_indices(normal([3, 2, 2]), size)
    assert list(zip(datasets.tolist(), numbers.tolist(), strict=True)) == one_after_another(normal([3, 2, 2]), size)
