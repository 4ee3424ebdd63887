"""Several datasets as one: how many samples each gives, and in which order they alternate."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_patch.data.blend_order import blend_indices
from megatron_patch.data.gpt import Sample
from megatron_patch.data.index_cache import cached
from megatron_patch.data.paths import Source

# The order below can take a little more from one dataset than its share; each is built this much longer.
SURPLUS = 0.005
# Samples counted together: numpy makes 8 bytes of each while it counts.
CHUNK = 1 << 20


class SampleDataset(Protocol):
    """What can be drawn from, and blended."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


Make = Callable[[str, int | None], SampleDataset]


class BlendedDataset:
    """Samples of several datasets: sample i is number `sample_index[i]` of dataset number `dataset_index[i]`."""

    def __init__(
        self, datasets: Sequence[SampleDataset], dataset_index: npt.NDArray, sample_index: npt.NDArray
    ) -> None:
        self.datasets = datasets
        self.dataset_index = dataset_index
        self.sample_index = sample_index

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> Sample:
        return self.datasets[int(self.dataset_index[index])][int(self.sample_index[index])]


def blended(sources: Sequence[Source], make: Make, num_samples: int, cache_path: str | None = None) -> SampleDataset:
    """At least `num_samples` samples of `sources`; `make(prefix, n)` builds one of at least n (None: one epoch).

    Weighted sources are repeated as often as their weight asks; sources without weights are read once, in proportion
    to their sizes. A single source without weight is not blended. Raises ValueError when there are too few samples.
    """
    if len(sources) == 1 and sources[0].weight is None:
        return make(sources[0].prefix, num_samples)
    if sources[0].weight is None:
        datasets = [make(source.prefix, None) for source in sources]
        weights = [len(dataset) for dataset in datasets]
        size = num_samples
        _check_once(sources, sum(weights), num_samples)
    else:
        weights = normalise([source.weight for source in sources])
        targets = [math.ceil(num_samples * weight) for weight in weights]
        datasets = [
            make(source.prefix, math.ceil(target * (1 + SURPLUS)))
            for source, target in zip(sources, targets, strict=True)
        ]
        size = sum(targets)
    # Weights given by the user are normalised twice, as in Megatron: the last bit decides ties.
    weights = normalise(weights)
    indices = cached(cache_path, {"weights": weights, "size": size}, lambda: blend_indices(weights, size))
    _check_overdraw(sources, datasets, indices[0])
    return BlendedDataset(datasets, *indices)


def normalise(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1."""
    values = np.asarray(weights, np.float64)
    return (values / values.sum()).tolist()


def _check_once(sources: Sequence[Source], available: int, wanted: int) -> None:
    if available < wanted:
        raise ValueError(
            f"datasets {' '.join(source.prefix for source in sources)!r} hold {available} samples and {wanted} are "
            "needed; without weights each is read once, so give weights (`0.5 A 0.5 B`) to repeat them"
        )


def _check_overdraw(sources: Sequence[Source], datasets: Sequence[SampleDataset], dataset_index: npt.NDArray) -> None:
    parts = (dataset_index[first : first + CHUNK] for first in range(0, len(dataset_index), CHUNK))
    drawn = sum(np.bincount(part, minlength=len(datasets)) for part in parts)
    for source, dataset, count in zip(sources, datasets, drawn, strict=True):
        if count > len(dataset):
            raise ValueError(
                f"dataset {source.prefix!r}: the blend draws {count} samples from {len(dataset)}; "
                "lower its weight or ask for fewer samples"
            )
