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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_patch.data.blend_order import blend_indices
from megatron_patch.data.gpt import build_indices

SEED = 1234
STATED = 0.14  # seconds of Megatron-Core 0.16.1 for the last case below, all three indices
CASES = ((1024, 1), (1024, 3), (256, 4))  # sequence length, epochs: the last gives 1.6 million samples
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


def _compare_samples(helpers: ModuleType | None, lengths: np.ndarray, seq_length: int, epochs: int, runs: int) -> None:
    ids = np.arange(len(lengths), dtype=np.int32)
    wanted = (epochs * int(lengths.sum(dtype=np.int64)) - 1) // seq_length

    def ours() -> tuple[np.ndarray, ...]:
        return build_indices(lengths, ids, wanted, seq_length=seq_length, seed=SEED)

    def theirs() -> tuple[np.ndarray, ...]:
        """What Megatron-Core's GPTDataset does; no final epoch is apart here, because all of it is used."""
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

    name = f"seq {seq_length}, {epochs} epochs, {wanted} samples"
    if helpers is None:
        (seconds,) = _medians([ours], runs)
        note = f"{seconds / STATED:5.2f} × {STATED:.3f} s, stated by others for 200 000 documents, not measured here"
        print(f"{name:40} {seconds:7.3f} s   {note if (seq_length, epochs) == CASES[-1] else ''}")
        return
    _check_equal(ours(), theirs())
    mine, peer = _medians([ours, theirs], runs)
    print(f"{name:40} {mine:7.3f} s   {mine / peer:5.2f} × Megatron-Core's {peer:.3f} s")


def _compare_blend(helpers: ModuleType, weights: list[float], size: int, runs: int) -> None:
    def theirs() -> tuple[np.ndarray, np.ndarray]:
        datasets, samples = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers.build_blending_indices(datasets, samples, np.asarray(weights), len(weights), size, False)
        return datasets, samples

    def ours() -> tuple[np.ndarray, np.ndarray]:
        return blend_indices(weights, size)

    _check_equal(ours(), theirs())
    mine, peer = _medians([ours, theirs], runs)
    name = f"blend of {len(weights)}, {size} samples"
    print(f"{name:40} {mine:7.3f} s   {mine / peer:5.2f} × Megatron-Core's {peer:.3f} s")


def _check_equal(ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...]) -> None:
    for mine, peer in zip(ours, theirs, strict=True):
        if not np.array_equal(mine, peer):
            raise RuntimeError("the indices are not Megatron-Core's; times of different results mean nothing")


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
