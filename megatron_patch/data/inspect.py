"""What is in a dataset, as text for people."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from megatron_patch.data.blend import SampleDataset
from megatron_patch.data.index_header import IndexHeader
from megatron_patch.data.indexed import IndexedDataset

SHOWN = 64  # tokens of a document or a sample
BAR = 40  # characters of the longest


def describe(header: IndexHeader, lengths: npt.NDArray) -> str:
    """Counts, and a histogram of the lengths of sequences in powers of two."""
    lines = [
        f"{header.prefix}: {header.documents} documents, {header.sequences} sequences, {header.tokens} tokens "
        f"of {header.dtype}"
    ]
    if len(lengths):
        middle = f"median {int(np.median(lengths))}, mean {lengths.mean():.1f}"
        lines.append(f"sequences: {np.count_nonzero(lengths == 0)} empty, {middle}, longest {lengths.max()} tokens")
        lines += _histogram(lengths)
    return "\n".join(lines)


def show_documents(
    indexed: IndexedDataset, count: int, tokenizer: PreTrainedTokenizerFast | None, sample_length: int | None = None
) -> str:
    """The beginnings of the first `count` documents, decoded where there is a tokenizer.

    Of fine-tuning samples of `sample_length` tokens these are shown, without the marks at the ends of segments.
    """
    boundaries = indexed.document_indices[: count + 1].tolist()
    lines = []
    for number, (first, last) in enumerate(pairwise(boundaries)):
        tokens = [token for sequence in range(first, last) for token in indexed.get(sequence)[:SHOWN].tolist()]
        total = int(indexed.sequence_lengths[first:last].sum())
        if sample_length is not None:
            total = sample_length
            tokens = [-1 - token if token < 0 else token for token in tokens[:total]]
        lines.append(f"document {number}, {total} tokens: {_text(tokens, total, tokenizer)}")
    return "\n".join(lines)


def show_samples(
    dataset: SampleDataset, numbers: Sequence[int], micro_batch: int, tokenizer: PreTrainedTokenizerFast | None
) -> str:
    """The samples `numbers` of one micro-batch."""
    lines = []
    for row, number in enumerate(numbers):
        tokens = dataset[number].tokens.tolist()
        lines.append(f"micro-batch {micro_batch}, row {row}, sample {number}: {_text(tokens, len(tokens), tokenizer)}")
    return "\n".join(lines)


def _text(tokens: list[int], total: int, tokenizer: PreTrainedTokenizerFast | None) -> str:
    shown = tokens[:SHOWN]
    is_text = tokenizer is not None and min(shown, default=0) >= 0  # labels are not
    text = repr(tokenizer.decode(shown)) if is_text else " ".join(map(str, shown))
    return text + (" …" if total > len(shown) else "")


def _histogram(lengths: npt.NDArray) -> list[str]:
    counts = np.bincount(np.frexp(lengths)[1])  # an exponent of two each: 0 | 1 | 2 3 | 4 to 7 | …
    lines = []
    for exponent, count in enumerate(counts.tolist()):
        first, last = (1 << exponent) >> 1, (1 << exponent) - 1
        if count:
            bar = "█" * max(1, round(BAR * count / counts.max()))
            lines.append(f"{f'{first}' if first >= last else f'{first}–{last}':>17} {count:>11} {bar}")
    return lines
