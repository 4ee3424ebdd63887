"""Fine-tuning samples as `.bin/.idx` documents, in Pai-Megatron-Patch's format: how they are written and read.

A document of 2·S numbers is one sample: S tokens, padding at the end, then S labels already shifted, −100 where nothing
is learned. The last token of every segment stands as −1 − id. Files of before that have no such mark.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_patch.config.data import DataConfig
from megatron_patch.data.blend import SampleDataset, blended
from megatron_patch.data.gpt import Sample, segment_starts
from megatron_patch.data.index_header import check_sample_documents, read_header
from megatron_patch.data.indexed import IndexedDataset
from megatron_patch.data.instructions import Tokenised
from megatron_patch.data.order import Order, repeated, shuffled, usable
from megatron_patch.data.paths import parse_blend
from megatron_patch.data.sidecar import check_made_for, read_sidecar

IGNORED = -100
DTYPE = "int32"  # whatever the vocabulary: labels and marks are negative


class IndexedInstructions:
    """`count` samples of `seq_length` tokens from the documents of one dataset, in an order of theirs.

    A row of several segments has `starts`, as rows of one have if `is_packed` or if the file marks segments. Where it
    does not, and is packed, a segment ends with each `eos`. Raises ValueError for a dataset of another length or kind,
    and for one that is not what its sidecar says.
    """

    def __init__(
        self, prefix: str, order: Order, count: int, *, seq_length: int, eos: int | None, is_packed: bool
    ) -> None:
        check_made_for(prefix, seq_length)
        check_sample_documents(read_header(prefix), seq_length)
        self._indexed, self._order, self._count = IndexedDataset(prefix), order, count
        self._eos, self._is_packed, self._length = eos, is_packed, seq_length
        self.has_marks = bool((self._indexed[0][:seq_length] < 0).any())
        _check_marks(prefix, self.has_marks)
        if is_packed and not self.has_marks and eos is None:
            raise ValueError(f"{prefix} does not mark where its segments end, and the tokenizer has no EOS to tell it")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        stored, labels = self._indexed[self._order(index)].astype(np.int64).reshape(2, self._length)
        is_learned = labels != IGNORED
        tokens = np.where(stored < 0, -1 - stored, stored)
        starts = None
        if self.has_marks:
            starts = segment_starts(stored < 0)
        elif self._is_packed:
            starts = segment_starts(segment_ends(tokens, is_learned, self._eos))
        return Sample(tokens, np.where(is_learned, labels, 0), is_learned.astype(np.float32), starts)


def open_samples(config: DataConfig, split: str, num_samples: int, eos: int | None) -> SampleDataset:
    """At least `num_samples` samples of a split, `train` (shuffled anew each epoch) or `valid`, in their order.

    Raises ValueError or FileNotFoundError for datasets that cannot be used.
    """

    def make(prefix: str, count: int | None) -> IndexedInstructions:
        first, last = usable(config, prefix, split, read_header(prefix).sequences)
        order = shuffled(first, last, config.seed) if split == "train" else repeated(first, last)
        return IndexedInstructions(
            prefix,
            order,
            last - first if count is None else count,
            seq_length=config.seq_length,
            eos=eos,
            is_packed=config.sft_packing,
        )

    paths = config.train_data_path if split == "train" else config.valid_data_path
    return blended(parse_blend(paths), make, num_samples, config.data_cache_path)


def document(records: Sequence[Tokenised], seq_length: int, pad: int) -> npt.NDArray:
    """The document of a sample that holds these records (int32 [2·S]), each a segment.

    Raises ValueError when they are longer than the sample together. The last token of a record has no label, unless
    the record was longer than the sample: then it goes on with a token that is not in it.
    """
    tokens, labels = np.full(seq_length, pad, DTYPE), np.full(seq_length, IGNORED, DTYPE)
    begin = 0
    for record in records:
        size = min(len(record.ids), seq_length)
        if begin + size > seq_length:
            raise ValueError(f"records of {begin + size} tokens do not fit in a sample of {seq_length}")
        end, following = begin + size, slice(1, size + 1)
        tokens[begin:end] = record.ids[:size]
        shifted = np.where(record.learned[following], record.ids[following], IGNORED)
        labels[begin : begin + len(shifted)] = shifted
        tokens[end - 1] = -1 - tokens[end - 1]
        begin = end
    return np.concatenate([tokens, labels])


def segment_ends(tokens: npt.NDArray, is_learned: npt.NDArray, eos: int | None) -> npt.NDArray:
    """Where EOS ends a segment; the padding, which may be of the same token, is not cut up."""
    learned = np.flatnonzero(is_learned)
    last = learned[-1] + 1 if len(learned) else -1  # the token that the last label names
    return (tokens == eos) & (np.arange(len(tokens)) <= last)


def _check_marks(prefix: str, has_marks: bool) -> None:
    told = (read_sidecar(prefix) or {}).get("segment_marks", has_marks)
    if told != has_marks:
        says, are = ("marks", "has none") if told else ("does not mark", "has marks")
        raise ValueError(
            f"{prefix}.json says that this dataset {says} where its segments end, but {prefix}.bin {are}; the files "
            "come from two different runs, build it again"
        )
