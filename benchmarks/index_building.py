"""How long sample indices take, as a ratio to Megatron-Core's own helper: `python3 benchmarks/index_building.py`.

Both sides run alternately in this process on the same lengths, and their results are compared. Without Megatron-Core
(`pip install megatron-core==0.16.1`, or --helpers with the path of its helpers_cpp library) the peer is a figure that
was measured elsewhere, and is labelled so.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_patch.data.blend_order import blend_indices
from megatron_patch.data.gpt import build_indices

Build = Callable[[], Sequence[np.ndarray]]
SEED = 1234
STATED = 0.14  # seconds of Megatron-Core 0.16.1 for the last case below, all three indices
CASES = ((1024, 1), (1024, 3), (256, 4))  # sequence length, epochs: the last gives 1.6 million samples
RUN_LENGTH, EPOCHS = CASES[-1]  # of each dataset of a whole run
BLENDS = ([0.7, 0.3], [0.4, 0.3, 0.2, 0.1], np.random.RandomState(0).dirichlet([1.0] * 20).tolist())


def main() -> None:
    """Print one line per case: seconds of both sides, and their ratio."""
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--documents", type=int, default=200_000)
    reader.add_argument("--samples", type=int, default=2_000_000, help="of a blend")
    reader.add_argument("--runs", type=int, default=5)
    reader.add_argument("--helpers", help="path of helpers_cpp*.so; absent: that of an installed megatron-core")
    options = reader.parse_args()
    helpers = _helpers(options.helpers)
    lengths = np.random.RandomState(0).randint(1, 1051, options.documents).astype(np.int32)
    print(f"{options.documents} documents, {lengths.sum(dtype=np.int64)} tokens; median of {options.runs} runs")
    for seq_length, epochs in CASES:
        _compare_samples(helpers, lengths, seq_length, epochs, options.runs)
    if helpers:
        for weights in BLENDS:
            _compare_blend(helpers, weights, options.samples, options.runs)
        _compare_run(helpers, lengths, BLENDS[1], options.runs)


def _compare_samples(helpers: ModuleType | None, lengths: np.ndarray, seq_length: int, epochs: int, runs: int) -> None:
    wanted = _samples(lengths, seq_length, epochs)
    name = f"seq {seq_length}, {epochs} epochs, {wanted} samples"
    ours = partial(_samples_ours, lengths, seq_length, epochs)
    if helpers is None:
        (seconds,) = _medians([ours], runs)
        note = f"{seconds / STATED:5.2f} × {STATED:.3f} s, stated by others for 200 000 documents, not measured here"
        print(f"{name:40} {seconds:7.3f} s   {note if (seq_length, epochs) == CASES[-1] else ''}")
        return
    _compare(name, ours, partial(_samples_theirs, helpers, lengths, seq_length, epochs), runs)


def _compare_blend(helpers: ModuleType, weights: list[float], size: int, runs: int) -> None:
    ours, theirs = partial(blend_indices, weights, size), partial(_blend_theirs, helpers, weights, size)
    _compare(f"blend of {len(weights)}, {size} samples", ours, theirs, runs)


def _compare_run(helpers: ModuleType, lengths: np.ndarray, weights: list[float], runs: int) -> None:
    """All indices of a run over datasets as large as their weights."""
    ends = np.cumsum([0, *(round(weight * len(lengths)) for weight in weights)])
    parts = [np.ascontiguousarray(lengths[first:last]) for first, last in pairwise(ends)]
    size = sum(_samples(part, RUN_LENGTH, EPOCHS) for part in parts)

    def ours() -> list[np.ndarray]:
        samples = [array for part in parts for array in _samples_ours(part, RUN_LENGTH, EPOCHS)]
        return [*samples, *blend_indices(weights, size)]

    def theirs() -> list[np.ndarray]:
        samples = [array for part in parts for array in _samples_theirs(helpers, part, RUN_LENGTH, EPOCHS)]
        return [*samples, *_blend_theirs(helpers, weights, size)]

    _compare(f"a run over {len(parts)} datasets, {size} samples", ours, theirs, runs)


def _compare(name: str, ours: Build, theirs: Build, runs: int) -> None:
    for mine, peer in zip(ours(), theirs(), strict=True):
        if not np.array_equal(mine, peer):
            raise RuntimeError("the indices are not Megatron-Core's; times of different results mean nothing")
    mine, peer = _medians([ours, theirs], runs)
    print(f"{name:40} {mine:7.3f} s   {mine / peer:5.2f} × Megatron-Core's {peer:.3f} s")


def _samples(lengths: np.ndarray, seq_length: int, epochs: int) -> int:
    return (epochs * int(lengths.sum(dtype=np.int64)) - 1) // seq_length


def _samples_ours(lengths: np.ndarray, seq_length: int, epochs: int) -> tuple[np.ndarray, ...]:
    ids = np.arange(len(lengths), dtype=np.int32)
    return build_indices(lengths, ids, _samples(lengths, seq_length, epochs), seq_length=seq_length, seed=SEED)


def _samples_theirs(
    helpers: ModuleType, lengths: np.ndarray, seq_length: int, epochs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What Megatron-Core's GPTDataset does; no final epoch is apart here, because all of it is used."""
    ids = np.arange(len(lengths), dtype=np.int32)
    tokens = int(np.sum(lengths[ids]))
    generator = np.random.RandomState(SEED)
    documents = np.mgrid[0:epochs, 0 : len(ids)][1]
    documents[:] = ids
    documents = documents.reshape(-1).astype(np.int32)
    generator.shuffle(documents)
    samples = helpers.build_sample_idx_int32(lengths.copy(), documents, seq_length, epochs, tokens, True, 1)
    assert samples.min() >= 0 and samples.max() <= max(len(documents), lengths.max())
    shuffle = np.arange(len(samples) - 1, dtype=np.uint32)
    generator.shuffle(shuffle)
    return documents, samples, shuffle


def _blend_theirs(helpers: ModuleType, weights: list[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    datasets, samples = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(datasets, samples, np.asarray(weights), len(weights), size, False)
    return datasets, samples


def _medians(works: list[Callable[[], object]], runs: int) -> list[float]:
    """Seconds of each; they alternate, so that all see the same load."""
    seconds = [[] for _ in works]
    for _ in range(runs):
        for work, taken in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def _helpers(path: str | None) -> ModuleType | None:
    """Megatron-Core's compiled helpers, loaded alone; None where there are none."""
    if path is None:
        try:
            found = importlib.util.find_spec("megatron.core")
        except ModuleNotFoundError:
            return None
        libraries = sorted(Path(found.origin).parent.glob("datasets/helpers_cpp*.so")) if found else []
        if not libraries:
            return None
        path = str(libraries[0])
    spec = importlib.util.spec_from_file_location("helpers_cpp", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
