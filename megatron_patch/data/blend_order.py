"""The order in which blended datasets alternate: Megatron's, bit for bit, computed for many stretches at once."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# A block of the order is cut into lanes that advance side by side, one numpy call for a step of all of them.
LANES = 4096
LANE_LENGTH = 2048
# A lane starts this many steps early from a guess. Neighbouring guesses meet within a few dozen steps.
LEAD = 256


def blend_indices(weights: Sequence[float], size: int) -> tuple[npt.NDArray, npt.NDArray]:
    """The dataset of each sample (int16 [size]) and its number in that dataset (uint32 [size], int64 from 2³² on).

    At every step the dataset furthest behind its weight gives its next sample; ties go to the first. This is
    Megatron-Core's order: no randomness, float64 arithmetic. Takes 6 bytes a sample, and 200 MB whatever the size.

    A lane is what the loop over all steps would give if it starts where its predecessor ends, and that is checked:
    lanes whose guess was wrong are run again from there, until all fit. Guesses decide the time, never the result.
    """
    weights = np.asarray(weights, np.float64)
    dataset_index = np.empty(size, np.int16)
    sample_index = np.empty(size, np.uint32 if size < 2**32 else np.int64)
    given = np.zeros(len(weights))
    for first in range(0, size, LANES * LANE_LENGTH):
        count = min(LANES * LANE_LENGTH, size - first)
        chosen = _block(weights, first, given, count)
        drawn = np.bincount(chosen, minlength=len(weights))
        dataset_index[first : first + count] = chosen
        sample_index[first : first + count] = _numbers(chosen, drawn, given)
        given += drawn
    return dataset_index, sample_index


def _block(weights: npt.NDArray, first: int, given: npt.NDArray, count: int) -> npt.NDArray:
    """The datasets of steps `first` to `first + count`, before which `given` [datasets] samples were drawn."""
    length = min(LANE_LENGTH, count)
    steps = np.arange(first, first + count, length)
    before = np.empty((len(steps), len(weights)))
    before[0] = given
    if len(steps) > 1:
        before[1:] = _guess(weights, steps[1:] - LEAD)
        _advance(weights, steps[1:] - LEAD, before[1:], LEAD)
    after = before.copy()
    chosen = _advance(weights, steps, after, length)
    while (unfit := 1 + np.flatnonzero((after[:-1] != before[1:]).any(axis=1))).size:
        before[unfit] = after[unfit - 1]
        again = before[unfit]
        chosen[:, unfit] = _advance(weights, steps[unfit], again, length)
        after[unfit] = again
    return chosen.T.reshape(-1)[:count]


def _advance(weights: npt.NDArray, steps: npt.NDArray, given: npt.NDArray, length: int) -> npt.NDArray:
    """The choices int16 [length, lanes] of lanes at `steps` [lanes]; `given` [lanes, datasets] is counted on."""
    chosen = np.empty((length, len(steps)), np.int16)
    lag, lanes, now = np.empty_like(given), np.arange(len(steps)), steps.astype(np.float64)
    for row in chosen:
        np.multiply.outer(np.maximum(now, 1), weights, out=lag)
        lag -= given
        furthest = lag.argmax(axis=1)
        given[lanes, furthest] += 1
        row[:] = furthest
        now += 1
    return chosen


def _guess(weights: npt.NDArray, steps: npt.NDArray) -> npt.NDArray:
    """About how many samples each dataset has given before `steps`: shares rounded so that they sum to the step."""
    shares = np.multiply.outer(steps.astype(np.float64), weights)
    whole = np.floor(shares)
    missing = steps - whole.sum(axis=1)
    rank = np.argsort(np.argsort(whole - shares, axis=1, kind="stable"), axis=1)
    return whole + (rank < missing[:, None])


def _numbers(chosen: npt.NDArray, drawn: npt.NDArray, given: npt.NDArray) -> npt.NDArray:
    """How many samples of the same dataset come before each one of a block."""
    numbers = np.empty(len(chosen), np.int64)
    skipped = given.astype(np.int64) - (np.cumsum(drawn) - drawn)
    numbers[np.argsort(chosen, kind="stable")] = np.arange(len(chosen)) + np.repeat(skipped, drawn)
    return numbers
