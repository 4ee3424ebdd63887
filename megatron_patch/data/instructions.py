"""Fine-tuning samples from raw JSON records: rendered once, tokenised once, learned where the answers stand."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from megatron_patch.data.gpt import Sample
from megatron_patch.data.index_cache import cached
from megatron_patch.data.json_lines import Record, read_records
from megatron_patch.data.prompts import Rendered, Renderer
from megatron_patch.data.records import conversation
from megatron_patch.data.sidecar import describe_source

RECORDS_PER_CALL = 1024


class Tokenised(NamedTuple):
    """Ids of one record (int32), and which of them the model has to write (bool)."""

    ids: npt.NDArray
    learned: npt.NDArray


class InstructionDataset:
    """Samples of `length` tokens, one per record, padded at the end; loss on the answers and their end markers only.

    Longer records are truncated. Records whose prompt leaves no room for an answer token are left out and counted in
    `skipped`. With a `cache_path` one process of a node tokenises a file, and all map the same tokens; the same file,
    tokenizer, template and length are not tokenised again. Raises ValueError for a malformed record (naming file and
    place) and when no record remains.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerFast,
        renderer: Renderer,
        *,
        length: int,
        cache_path: str | None = None,
    ) -> None:
        self.length, self.pad = length, pad_id(tokenizer)
        key = {} if cache_path is None else _key(path, tokenizer, renderer, length)
        arrays = cached(cache_path, key, lambda: _gathered(path, tokenizer, renderer, length))
        self._ids, self._learned, self._bounds, skipped = arrays
        self.skipped = int(skipped)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Sample:
        # What follows a single record is padding, which it does not see anyway.
        return self.joined([index])._replace(starts=None)

    def tokens(self, index: int) -> int:
        """Tokens that a record takes in a sample: all but its last, which is only a label."""
        return int(self._bounds[index + 1] - self._bounds[index]) - 1

    def joined(self, indices: Sequence[int]) -> Sample:
        """One sample of these records, one after the other, in segments of their own; so is the padding at the end."""
        tokens, labels = (np.full(self.length, self.pad, np.int64) for _ in range(2))
        loss_mask, starts = np.zeros(self.length, np.float32), np.empty(self.length, np.int64)
        begin = 0
        for index in indices:
            record, end = slice(self._bounds[index], self._bounds[index + 1]), begin + self.tokens(index)
            tokens[begin:end], labels[begin:end] = self._ids[record][:-1], self._ids[record][1:]
            loss_mask[begin:end] = self._learned[record][1:]
            starts[begin:end] = begin
            begin = end
        starts[begin:] = begin
        return Sample(tokens, labels, loss_mask, starts)


def _key(
    path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerFast, renderer: Renderer, length: int
) -> dict[str, Any]:
    """All that the tokens of a file depend on."""
    texts = {"tokenizer": tokenizer.backend_tokenizer.to_str(), "template": renderer.template}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return {"records": describe_source(path)["sha256"], **digests, "length": length}


def _gathered(
    path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerFast, renderer: Renderer, length: int
) -> tuple[npt.NDArray, ...]:
    """Ids, what is learned of them, the bounds of the records in both, and how many were left out."""
    records, skipped = [], 0
    for record in tokenised(path, tokenizer, renderer):
        cut = Tokenised(*(part[: length + 1] for part in record))  # the extra token is the last label
        if cut.learned[1:].any():
            records.append(cut)
        else:
            skipped += 1
    if not records:
        raise ValueError(nothing_left(path, skipped, length))
    bounds = np.cumsum([0, *(len(record.ids) for record in records)])
    ids, learned = (np.concatenate(parts) for parts in zip(*records, strict=True))
    return ids, learned, bounds, np.array(skipped)


def tokenised(
    path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerFast, renderer: Renderer
) -> Iterator[Tokenised]:
    """Every record of a file, in its order. Raises ValueError naming file and place of a malformed one."""
    return encoded((_render(record, where, renderer) for where, record in read_records(path)), tokenizer, renderer)


def encoded(
    rendered: Iterator[Rendered], tokenizer: PreTrainedTokenizerFast, renderer: Renderer
) -> Iterator[Tokenised]:
    """Each text as tokens, with what is to be learned of them."""
    encode = tokenizer.backend_tokenizer.encode_batch
    while chunk := list(islice(rendered, RECORDS_PER_CALL)):
        encodings = encode([text for text, _ in chunk], add_special_tokens=renderer.adds_special_tokens)
        for encoding, (_, spans) in zip(encodings, chunk, strict=True):
            yield Tokenised(np.array(encoding.ids, np.int32), _learned(encoding, spans))


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Any id will do: padding is told by its place, never by its id, so it may equal EOS."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def nothing_left(path: str | os.PathLike[str], skipped: int, length: int) -> str:
    """The sentence about a file that gives no sample."""
    if not skipped:
        return f"{os.fspath(path)} holds no record"
    return f"{os.fspath(path)}: none of {skipped} records has a prompt of at most {length} tokens"


def _learned(encoding: Encoding, spans: Sequence[tuple[int, int]]) -> npt.NDArray:
    """Which tokens cover characters of `spans`.

    A token across the beginning of a span belongs to it: a model given the prompt has to write it. What the tokenizer
    adds around the text is not ours to learn.
    """
    begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    learned = np.zeros(len(begins), bool)
    for first, last in spans:
        learned |= (begins < last) & ((ends > first) | (begins >= first))
    return learned & (np.array(encoding.special_tokens_mask) == 0)


def _render(record: Record, where: str, renderer: Renderer) -> Rendered:
    try:
        return renderer.render(conversation(record))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
