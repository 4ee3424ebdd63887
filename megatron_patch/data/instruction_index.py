"""ModelLink's instruction data as training samples: three aligned `.bin/.idx` pairs, in the order ModelLink reads them.

A sequence of each pair is one sample: tokens, attention mask, and labels that are not shifted yet, −100 where nothing
is learned. A mask that counts 1, 2, 3, … numbers the segments of a packed sample.
"""

import logging

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from megatron_patch.config.data import DataConfig
from megatron_patch.data.blend import SampleDataset, blended
from megatron_patch.data.gpt import Sample, segment_starts
from megatron_patch.data.index_header import check_instruction_files, instruction_prefixes
from megatron_patch.data.indexed import IndexedDataset
from megatron_patch.data.instructions import pad_id
from megatron_patch.data.order import usable
from megatron_patch.data.paths import parse_blend
from megatron_patch.data.sft_index import IGNORED, segment_ends
from megatron_patch.data.sidecar import read_sidecar
from megatron_patch.data.splits import shifted_split_range


class InstructionFiles:
    """Samples of `seq_length` tokens: sequence `order[i]` without its last token, cut or padded, its labels shifted.

    A row whose mask numbers segments has `starts`. So have all rows if `is_packed`, where a file does not say that it
    numbers them: there a segment ends with each `eos`. Raises ValueError for pairs that do not belong together.
    """

    def __init__(
        self, prefix: str, order: npt.NDArray, *, seq_length: int, pad: int, eos: int | None, is_packed: bool
    ) -> None:
        check_instruction_files(prefix)
        names = instruction_prefixes(prefix)
        self._ids, self._mask, self._labels = map(IndexedDataset, names)
        self._order, self._length, self._pad, self._eos = order, seq_length, pad, eos
        for other in (self._mask, self._labels):
            differs = other.sequence_lengths != self._ids.sequence_lengths
            if differs.any():
                raise ValueError(
                    f"sample {int(differs.argmax())} of {names[0]} has another length in {other.prefix}; "
                    "the files come from two different runs, preprocess again"
                )
        self._is_cut_at_eos = is_packed and not (read_sidecar(names[0]) or {}).get("segment_marks", False)
        if self._is_cut_at_eos and eos is None:
            raise ValueError(f"{prefix} does not mark where its segments end, and the tokenizer has no EOS to tell it")

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Sample:
        number = int(self._order[index])
        size = self._size(number)
        tokens, labels = np.full(self._length, self._pad, np.int64), np.full(self._length, IGNORED, np.int64)
        tokens[:size] = self._ids.get(number, 0, size)
        labels[:size] = self._labels.get(number, 1, size)
        is_learned = labels != IGNORED
        starts = None
        mask = self._mask.get(number, 0, size)
        if size and mask.max() > 1:
            is_end = np.zeros(self._length, bool)
            is_end[:size] = np.append(mask[1:] != mask[:-1], True)
            starts = segment_starts(is_end)
        elif self._is_cut_at_eos:
            starts = segment_starts(segment_ends(tokens, is_learned, self._eos))
        return Sample(tokens, np.where(is_learned, labels, 0), is_learned.astype(np.float32), starts)

    def cut(self, first: int, last: int) -> tuple[int, int]:
        """How many of these sequences are longer than a sample, and in how many of them nothing is left to learn."""
        longer = first + np.flatnonzero(self._ids.sequence_lengths[first:last] - 1 > self._length)
        lost = sum(bool((self._labels.get(int(number), 1, self._length) == IGNORED).all()) for number in longer)
        return len(longer), lost

    def _size(self, number: int) -> int:
        return max(0, min(int(self._ids.sequence_lengths[number]) - 1, self._length))


def shuffle_index(first: int, last: int, num_samples: int | None, seed: int) -> npt.NDArray:
    """ModelLink's order, int64: permutations of `first` to `last` (excluded) one after the other, until they are more
    than `num_samples` (None: one of them)."""
    generator, count = np.random.RandomState(seed), last - first
    passes = 1 if num_samples is None else num_samples // count + 1
    return first + np.concatenate([generator.permutation(count) for _ in range(passes)])


def open_instructions(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, split: str, num_samples: int, *, is_loud: bool
) -> SampleDataset:
    """At least `num_samples` samples of a split, `train` or `valid`, in their order.

    `is_loud`: say how many samples are cut. Raises ValueError or FileNotFoundError for data that cannot be used.
    """

    def make(prefix: str, count: int | None) -> InstructionFiles:
        samples = check_instruction_files(prefix).sequences
        first, last = usable(config, prefix, split, samples, shifted_split_range)
        dataset = InstructionFiles(
            prefix,
            shuffle_index(first, last, count, config.seed),
            seq_length=config.seq_length,
            pad=pad_id(tokenizer),
            eos=tokenizer.eos_token_id,
            is_packed=config.sft_packing,
        )
        longer, lost = dataset.cut(first, last)
        if lost == last - first:
            raise ValueError(f"{prefix}: no sample has anything to learn in its first {config.seq_length} tokens")
        if longer and is_loud:
            logging.getLogger(__name__).warning(
                "%s: %d of %d samples for %s are cut to %d tokens, and %d of these have nothing left to learn",
                prefix, longer, last - first, split, config.seq_length, lost,
            )  # fmt: skip
        return dataset

    paths = config.train_data_path if split == "train" else config.valid_data_path
    return blended(parse_blend(paths), make, num_samples, config.data_cache_path)
