"""Fine-tuning samples from raw JSON records: rendered once, tokenised once, learned where the answer stands."""

import os
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from megatron_patch.data.gpt import Sample
from megatron_patch.data.json_lines import Record, check_characters, read_records
from megatron_patch.data.prompts import Instruction, Rendered, Renderer

QUESTION_KEYS = ("instruction", "query")
ANSWER_KEYS = ("output", "content", "response")
RECORDS_PER_CALL = 1024


class _Tokenised(NamedTuple):
    """Ids of one record (int32), and which of them the model has to write: `first` to `end`, excluded."""

    ids: npt.NDArray
    first: int
    end: int


class InstructionDataset:
    """Samples of `length` tokens, one per record, padded at the end; loss on the answer and its end marker only.

    Longer records are truncated. Records whose prompt leaves no room for an answer token are left out and counted in
    `skipped`. Raises ValueError for a malformed record (naming file and place) and when no record remains.
    """

    def __init__(
        self, path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerFast, renderer: Renderer, *, length: int
    ) -> None:
        self._length = length
        # Any id will do: padding is told by its place, never by its id, so it may equal EOS.
        self._pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        records, self._learned, self.skipped = [], [], 0
        for ids, first, end in _tokenised(path, tokenizer, renderer):
            if first > length:
                self.skipped += 1
                continue
            records.append(ids[: length + 1])  # the extra token is the last label
            self._learned.append((first, min(end, length + 1)))
        if not records:
            raise ValueError(
                f"{os.fspath(path)}: none of {self.skipped} records has a prompt of at most {length} tokens"
                if self.skipped
                else f"{os.fspath(path)} holds no record"
            )
        self._bounds = np.cumsum([0, *map(len, records)])
        self._ids = np.concatenate(records)

    def __len__(self) -> int:
        return len(self._learned)

    def __getitem__(self, index: int) -> Sample:
        ids = self._ids[self._bounds[index] : self._bounds[index + 1]]
        window = np.full(self._length + 1, self._pad, np.int64)
        window[: len(ids)] = ids
        first, end = self._learned[index]
        loss_mask = np.zeros(self._length, np.float32)
        loss_mask[max(first - 1, 0) : end - 1] = 1.0
        return Sample(window[:-1], window[1:], loss_mask)


def _tokenised(
    path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerFast, renderer: Renderer
) -> Iterator[_Tokenised]:
    rendered = (_render(record, where, renderer) for where, record in read_records(path))
    encode = tokenizer.backend_tokenizer.encode_batch
    while chunk := list(islice(rendered, RECORDS_PER_CALL)):
        encodings = encode([text for text, _ in chunk], add_special_tokens=renderer.adds_special_tokens)
        for encoding, (_, answer_start) in zip(encodings, chunk, strict=True):
            yield _Tokenised(np.array(encoding.ids, np.int32), *_answer_tokens(encoding, answer_start))


def _answer_tokens(encoding: Encoding, answer_start: int) -> tuple[int, int]:
    """First and past-the-last token that covers the text from character `answer_start` to its end.

    A token across the boundary belongs to the answer: a model given the prompt has to write it.
    """
    added = encoding.special_tokens_mask  # by the tokenizer around the text, so not ours to learn
    end = len(added)
    while end and added[end - 1]:
        end -= 1
    for position, (begin, stop) in enumerate(encoding.offsets[:end]):
        if stop > answer_start or begin >= answer_start:
            return position, end
    return end, end


def _render(record: Record, where: str, renderer: Renderer) -> Rendered:
    try:
        return renderer.render(_instruction(record))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _instruction(record: Record) -> Instruction:
    has_input = record.get("input") is not None
    return Instruction(
        _text(record, QUESTION_KEYS), _text(record, ("input",)) if has_input else "", _text(record, ANSWER_KEYS)
    )


def _text(record: Record, keys: tuple[str, ...]) -> str:
    for key in keys:
        if key in record:
            if isinstance(record[key], str):
                check_characters(record[key])
                return record[key]
            raise ValueError(f"{key} is {type(record[key]).__name__}, not text")
    raise ValueError(f"no {' or '.join(keys)} among its keys ({', '.join(record) or 'none'})")
