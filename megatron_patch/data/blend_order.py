"""The order in which blended datasets alternate: Megatron's, bit for bit, computed for many stretches at once."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# A block of the order is cut into lanes that advance side by side, some numpy calls for a step of all of them. Counts
# of all lanes stay in a processor's cache, and are no power of two, where rows would be in each other's way.
LANES = 4000
COUNTS = 80_000
LANE_LENGTH = 4096
# A lane starts so many steps early from a guess, and is no shorter: neighbouring guesses meet within a few dozen steps,
# later where there are many datasets.
LEAD = 64
LEAD_PER_DATASET = 4


def blend_indices(weights: Sequence[float], size: int) -> tuple[npt.NDArray, npt.NDArray]:
    """The dataset of each sample (int16 [size]) and its number in that dataset (uint32 [size], int64 from 2³² on).

    At every step the dataset furthest behind its weight gives its next sample; ties go to the first. This is
    Megatron-Core's order: no randomness, float64 arithmetic. Takes 6 bytes a sample, and 200 MB whatever the size.

    A lane is what the loop over all steps would give if it starts where its predecessor ends, and that is checked:
    lanes whose guess was wrong are run again from there, until all fit. Guesses decide the time, never the result.
    """
    column = np.asarray(weights, np.float64)[:, None]
    lead = max(LEAD, LEAD_PER_DATASET * len(column))
    lanes = max(1, min(LANES, COUNTS // len(column)))
    length = max(lead, min(LANE_LENGTH, -(-size // lanes)), 1)
    dataset_index = np.empty(size + length, np.int16)  # the last lane goes on to its end
    sample_index = np.empty(size + length, np.uint32 if size < 2**32 else np.int64)
    given = np.zeros(column.shape)
    for first in range(0, size, lanes * length):
        steps = np.arange(first, min(first + lanes * length, size), length, dtype=np.float64)
        block = slice(first, first + len(steps) * length)
        numbers = np.empty((length, len(steps)), sample_index.dtype)
        ranks, given = _block(column, steps, given, numbers, lead)
        np.subtract(len(column), ranks.T, out=dataset_index[block].reshape(-1, length), dtype=np.int16)
        sample_index[block].reshape(-1, length)[:] = numbers.T
    return dataset_index[:size], sample_index[:size]


def _block(
    weights: npt.NDArray, steps: npt.NDArray, given: npt.NDArray, numbers: npt.NDArray, lead: int
) -> tuple[npt.NDArray, npt.NDArray]:
    """The ranks [length, lanes] chosen from `steps` [lanes] on, and what each dataset has given after them.

    `given` [datasets, 1] came before. Fills `numbers` [length, lanes].
    """
    before = np.concatenate([given, _guess(weights, steps[1:] - lead)], axis=1)
    _, before[:, 1:] = _advance(weights, steps[1:] - lead, before[:, 1:], numbers[:lead, 1:])
    ranks, after = _advance(weights, steps, before, numbers)
    while (unfit := 1 + np.flatnonzero((after[:, :-1] != before[:, 1:]).any(axis=0))).size:
        before[:, unfit] = after[:, unfit - 1]
        again = np.empty((len(numbers), len(unfit)), numbers.dtype)
        ranks[:, unfit], after[:, unfit] = _advance(weights, steps[unfit], before[:, unfit], again)
        numbers[:, unfit] = again
    return ranks, after[:, -1:]


def _advance(
    weights: npt.NDArray, steps: npt.NDArray, given: npt.NDArray, numbers: npt.NDArray
) -> tuple[npt.NDArray, npt.NDArray]:
    """What lanes at `steps` [lanes] choose, as many times as `numbers` [length, lanes] has rows, and `given` after it.

    Chosen datasets are told by their rank, which is 1 for the last and the highest for the first: of several that are
    equally far behind, the highest is the first. `numbers` becomes how many samples each had given before.
    """
    given, now = np.array(given, order="C"), np.maximum(steps, 1)
    (datasets, lanes), kind = given.shape, np.min_scalar_type(len(given))
    rank = np.arange(datasets, 0, -1, dtype=kind)[:, None]
    ranks, lane, flat = np.empty(numbers.shape, kind), np.arange(lanes), given.reshape(-1)
    row = (datasets - np.arange(datasets + 1)) * lanes  # where the counts of each rank begin
    lag, is_furthest, ranked = np.empty(given.shape), np.empty(given.shape, bool), np.empty(given.shape, kind)
    furthest, at, drawn = np.empty(lanes), np.empty(lanes, np.intp), np.empty(lanes)
    for step, (chosen, number) in enumerate(zip(ranks, numbers, strict=True), 1):
        np.multiply(weights, now, out=lag)
        np.subtract(lag, given, out=lag)
        np.maximum.reduce(lag, axis=0, out=furthest)
        np.equal(lag, furthest, out=is_furthest)
        np.multiply(is_furthest.view(np.uint8), rank, out=ranked)
        np.maximum.reduce(ranked, axis=0, out=chosen)
        row.take(chosen, out=at, mode="clip")  # the faster way; nothing is out of bounds
        np.add(at, lane, out=at)
        flat.take(at, out=drawn, mode="clip")
        number[:] = drawn
        np.add(drawn, 1, out=drawn)
        flat[at] = drawn
        np.add(steps, step, out=now)
    return ranks, given


def _guess(weights: npt.NDArray, steps: npt.NDArray) -> npt.NDArray:
    """About how many samples each dataset has given before `steps`: shares rounded so that they sum to the step."""
    shares = weights * steps
    whole = np.floor(shares)
    missing = steps - whole.sum(axis=0)
    rank = np.argsort(np.argsort(whole - shares, axis=0, kind="stable"), axis=0)
    return whole + (rank < missing)
