"""Pre-training samples: fixed-length windows over the shuffled documents of one dataset, in Megatron's order.

The documents of a split are repeated for as many epochs as the samples need, shuffled, and read as one stream of
tokens. Sample j is tokens j·S to (j+1)·S of it, both included, so consecutive samples share one token. Samples are
then shuffled. Everything is drawn from one legacy numpy generator, documents first.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_patch.data.index_cache import cached, content
from megatron_patch.data.indexed import IndexedDataset

# With less than this share of the last epoch needed, its documents are shuffled apart from the full epochs'.
FINAL_EPOCH_THRESHOLD = 0.80
# Documents looked at together: what is held besides the result stays small however many samples there are.
CHUNK = 1 << 14
# Up to so many elements are shuffled as int64, which numpy does faster than other sizes; a copy of 512 MB at most.
WIDE = 1 << 26


class Sample(NamedTuple):
    """One training sample: tokens int64 [S], labels int64 [S] already shifted, loss_mask float32 [S].

    `starts`, int64 [S], where it holds several segments: the position of the first token of each token's segment.
    """

    tokens: npt.NDArray
    labels: npt.NDArray
    loss_mask: npt.NDArray
    starts: npt.NDArray | None = None


class Documents(NamedTuple):
    """What the end of a document, the token `eod`, means within a sample.

    `are_apart`: a token does not see the documents before its own. Only distances between positions count in rotary
    attention, so that positions restart with it. `is_end_masked`: what follows an end is not learned from it.
    """

    eod: int
    are_apart: bool
    is_end_masked: bool


class Epochs(NamedTuple):
    """How often the documents are read, and how many samples come before a last epoch kept apart (0: none is)."""

    count: int
    samples_before_final: int


class SampleIndices(NamedTuple):
    """The three arrays that fix the order of samples.

    `documents` int32 [epochs · sequences]; `samples` int32 or int64 [n + 1, 2]: position in `documents` and token
    offset of each sample's first token; `shuffle` uint32 or int64 [n].
    """

    documents: npt.NDArray
    samples: npt.NDArray
    shuffle: npt.NDArray


class GPTDataset:
    """Samples of `seq_length` tokens from sequences `first` to `last` (excluded) of an indexed dataset.

    `num_samples` asks for at least that many, over as many epochs as it takes; None means one epoch. Raises
    ValueError when there is nothing to draw from.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        sequences: tuple[int, int],
        num_samples: int | None,
        *,
        seq_length: int,
        seed: int,
        cache_path: str | None = None,
        documents: Documents | None = None,
    ) -> None:
        self._indexed = indexed
        self._documents = documents
        ids = np.arange(*sequences, dtype=np.int32)
        _check_enough(indexed, ids, num_samples, seq_length)
        key = {
            "lengths": content(indexed.sequence_lengths[slice(*sequences)]),
            "first": sequences[0],
            "num_samples": num_samples,
            "seq_length": seq_length,
            "seed": seed,
        }
        self.indices = SampleIndices(
            *cached(
                cache_path,
                key,
                lambda: build_indices(indexed.sequence_lengths, ids, num_samples, seq_length=seq_length, seed=seed),
            )
        )
        self._loss_mask = np.ones(seq_length, np.float32)

    def __len__(self) -> int:
        return len(self.indices.shuffle)

    def __getitem__(self, index: int) -> Sample:
        window = self._window(int(self.indices.shuffle[index]))
        tokens, loss_mask, starts = window[:-1], self._loss_mask.copy(), None
        if self._documents is not None:
            is_end = tokens == self._documents.eod
            if self._documents.is_end_masked:
                loss_mask[is_end] = 0
            if self._documents.are_apart:
                starts = segment_starts(is_end)
        return Sample(tokens, window[1:], loss_mask, starts)

    def _window(self, sample: int) -> npt.NDArray:
        """The seq_length + 1 tokens of one sample, int64."""
        (first, start), (last, end) = self.indices.samples[sample : sample + 2].tolist()
        documents = self.indices.documents[first : last + 1].tolist()
        get = self._indexed.get
        if first == last:
            return get(documents[0], start, end - start + 1).astype(np.int64)
        parts = [get(documents[0], start), *map(get, documents[1:-1]), get(documents[-1], 0, end + 1)]
        return np.concatenate(parts, dtype=np.int64)


def segment_starts(is_end: npt.NDArray) -> npt.NDArray:
    """For each token [S] the position of its segment's first one, int64, where `is_end` is true of the last ones."""
    starts = np.zeros(len(is_end), np.int64)
    begins = 1 + np.flatnonzero(is_end[:-1])
    starts[begins] = begins
    return np.maximum.accumulate(starts)


def build_indices(
    lengths: npt.NDArray, sequences: npt.NDArray, num_samples: int | None, *, seq_length: int, seed: int
) -> SampleIndices:
    """The order of at least `num_samples` samples (None: one epoch) from `sequences`, whose sizes are in `lengths`.

    Equal to Megatron-Core's, array by array, except that no loop runs over tokens or documents. Takes 12 bytes a sample
    (24 where there are 2³¹ documents or more) and 4 for each document of each epoch; while it works 8 more for each
    document, and half a GB.
    """
    tokens = int(lengths[sequences].sum(dtype=np.int64))
    epochs = _count_epochs(tokens, num_samples, seq_length)
    generator = np.random.RandomState(seed)
    documents = _document_index(sequences, epochs, generator)
    samples = _sample_index(lengths, documents, seq_length, tokens * epochs.count)
    shuffle = _shuffle_index(len(samples) - 1, epochs.samples_before_final, generator)
    return SampleIndices(documents, samples, shuffle)


def _check_enough(indexed: IndexedDataset, ids: npt.NDArray, num_samples: int | None, seq_length: int) -> None:
    tokens = int(indexed.sequence_lengths[ids].sum(dtype=np.int64))
    # One epoch has to hold a whole sample; where more are asked for, documents repeat until they do.
    needed = seq_length + 1 if num_samples is None else 1
    if tokens < needed:
        raise ValueError(
            f"dataset {indexed.prefix!r}: {len(ids)} of its {len(indexed)} sequences are used here and hold {tokens} "
            f"tokens, which is too little for a sample of seq_length {seq_length}; add data or change --split"
        )


def _count_epochs(tokens: int, num_samples: int | None, seq_length: int) -> Epochs:
    if num_samples is None:
        return Epochs(1, 0)
    count = max(1, -(-(num_samples * seq_length + 1) // tokens))
    if count == 1:
        return Epochs(1, 0)
    before = ((count - 1) * tokens - 1) // seq_length
    per_epoch = (tokens - 1) // seq_length
    is_apart = num_samples - before < int(FINAL_EPOCH_THRESHOLD * per_epoch)
    return Epochs(count, before if is_apart else 0)


def _document_index(sequences: npt.NDArray, epochs: Epochs, generator: np.random.RandomState) -> npt.NDArray:
    index = np.tile(sequences, epochs.count)
    full = len(sequences) * (epochs.count - 1) if epochs.samples_before_final else 0
    return _shuffled(index, full, generator)


def _sample_index(lengths: npt.NDArray, documents: npt.NDArray, seq_length: int, tokens: int) -> npt.NDArray:
    """Where every seq_length-th of all `tokens` lies. `lengths` are those of every sequence."""
    widest = max(len(documents), int(lengths.max()))
    dtype = np.int32 if widest <= np.iinfo(np.int32).max else np.int64
    index = np.empty((-(-tokens // seq_length), 2), dtype)
    done = start = 0  # samples placed, and where the next document begins, seen from the first one that is not
    for first in range(0, len(documents), CHUNK):
        own = lengths.take(documents[first : first + CHUNK])
        stops = start + np.cumsum(own, dtype=np.int64)
        # Samples that begin before each document's end; numpy divides what has no sign twice as fast.
        begun = ((stops + (seq_length - 1)).view(np.uint64) // np.uint64(seq_length)).view(np.int64)
        count = int(begun[-1])
        at = np.cumsum(np.bincount(begun, minlength=count + 1)[:-1])
        part = index[done : done + count]
        part[:, 0] = first + at
        part[:, 1] = np.arange(0, count * seq_length, seq_length) - (stops - own).take(at)
        start = int(stops[-1]) - count * seq_length
        done += count
    index[0, 0] = 0  # Megatron starts at the first document even when it is empty
    return index


def _shuffle_index(count: int, before_final: int, generator: np.random.RandomState) -> npt.NDArray:
    dtype = np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64
    return _shuffled(np.arange(count, dtype=dtype), before_final, generator)


def _shuffled(index: npt.NDArray, before_final: int, generator: np.random.RandomState) -> npt.NDArray:
    """`index`, shuffled in place; what comes before the last epoch apart from it where `before_final` is not 0."""
    work = index.astype(np.int64) if len(index) <= WIDE else index
    for part in (work[:before_final], work[before_final:]):
        generator.shuffle(part)
    index[:] = work
    return index
