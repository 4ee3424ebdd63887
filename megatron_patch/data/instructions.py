"""Fine-tuning samples from raw JSON records: rendered once, tokenised once, learned where the answers stand."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from megatron_patch.data.gpt import Sample
from megatron_patch.data.index_cache import cached
from megatron_patch.data.inputs import Row, check_readable, read_rows, resolve_inputs
from megatron_patch.data.json_lines import Check, Record, check_object
from megatron_patch.data.left_out import LeftOut, nothing_left_out
from megatron_patch.data.prompts import Rendered, Renderer
from megatron_patch.data.records import NAMES, Names, conversation
from megatron_patch.data.sidecar import describe_source

RECORDS_PER_CALL = 1024
# Input bytes that are read at once, which bounds memory while records are tokenised.
BYTES_PER_BATCH = 1 << 20


class Tokenised(NamedTuple):
    """Ids of one record (int32), and which of them the model has to write (bool)."""

    ids: npt.NDArray
    learned: npt.NDArray


class Item(NamedTuple):
    """A record and its place (`file, line 3`), or the records that an input wants in one sample."""

    place: str
    records: list[Tokenised]
    is_pack: bool


class Material(NamedTuple):
    """Files of fine-tuning records, and what turns them into tokens."""

    files: tuple[Path, ...]
    tokenizer: PreTrainedTokenizerFast
    renderer: Renderer
    names: Names


class InstructionDataset:
    """Samples of `length` tokens, one per record, padded at the end; loss on the answers and their end markers only.

    Longer records are truncated. Records whose prompt leaves no room for an answer token are left out and counted in
    `skipped`. With a `cache_path` one process of a node tokenises the files, and all map the same tokens; the same
    files, tokenizer, template and length are not tokenised again. Raises ValueError for a malformed record (naming file
    and place) and when no record remains.
    """

    def __init__(self, material: Material, *, length: int, cache_path: str | None = None) -> None:
        self.length, self.pad = length, pad_id(material.tokenizer)
        key = {} if cache_path is None else _key(material, length)
        arrays = cached(cache_path, key, lambda: _gathered(material, length))
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


def material_of(
    words: Sequence[str | os.PathLike[str]],
    tokenizer: PreTrainedTokenizerFast,
    renderer: Renderer,
    names: Names = NAMES,
    *,
    is_recursive: bool = False,
) -> Material:
    """The files that `words` name: files, directories, patterns. Raises as `resolve_inputs` and `check_readable` do."""
    files = tuple(resolve_inputs([os.fspath(word) for word in words], is_recursive))
    check_readable(files)
    return Material(files, tokenizer, renderer, names)


def _key(material: Material, length: int) -> dict[str, Any]:
    """All that the tokens of the files depend on."""
    texts = {"tokenizer": material.tokenizer.backend_tokenizer.to_str(), "template": material.renderer.template}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    records = [describe_source(path)["sha256"] for path in material.files]
    return {"records": records, "names": material.names, **digests, "length": length}


def _gathered(material: Material, length: int) -> tuple[npt.NDArray, ...]:
    """Ids, what is learned of them, the bounds of the records in both, and how many were left out."""
    records, skipped = [], 0
    for item in tokenised(material):
        cut = Tokenised(*(part[: length + 1] for part in item.records[0]))  # the extra token is the last label
        if cut.learned[1:].any():
            records.append(cut)
        else:
            skipped += 1
    if not records:
        raise ValueError(nothing_left(material.files, skipped, length))
    bounds = np.cumsum([0, *(len(record.ids) for record in records)])
    ids, learned = (np.concatenate(parts) for parts in zip(*records, strict=True))
    return ids, learned, bounds, np.array(skipped)


def tokenised(material: Material, left_out: LeftOut | None = None, check: Check = check_object) -> Iterator[Item]:
    """Every record of the files, in their order; with `check_objects` also lists of them.

    What cannot be used goes to `left_out`. Without it, it raises ValueError naming file and place.
    """
    left_out = nothing_left_out() if left_out is None else left_out
    for path in material.files:
        for rows in read_rows(path, None, BYTES_PER_BATCH, check):
            left_out.counts.update({"blank": rows.blank} if rows.blank else {})
            rendered = [(row, texts) for row in rows.rows if (texts := _rendered(row, material, left_out))]
            every = encoded((text for _, texts in rendered for text in texts), material.tokenizer, material.renderer)
            for row, texts in rendered:
                yield Item(row.place, list(islice(every, len(texts))), isinstance(row.record, list))


def _rendered(row: Row, material: Material, left_out: LeftOut) -> list[Rendered]:
    """The texts of a row's records; none if it is left out."""
    if row.record is None:
        left_out.add("malformed", row.problem)
        return []
    records = row.record if isinstance(row.record, list) else [row.record]
    try:
        return [
            _render(record, row.place if record is row.record else f"{row.place}, its record {number}", material)
            for number, record in enumerate(records, 1)
        ]
    except ValueError as error:
        left_out.add("unusable", str(error))
        return []


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


def nothing_left(files: Sequence[Path], skipped: int, length: int) -> str:
    """The sentence about files that give no sample."""
    name = f"{files[0]} (and {len(files) - 1} more)" if len(files) > 1 else f"{files[0]}"
    if not skipped:
        return f"{name} holds no record"
    return f"{name}: none of {skipped} records has a prompt of at most {length} tokens"


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


def _render(record: Record, where: str, material: Material) -> Rendered:
    try:
        return material.renderer.render(conversation(record, material.names))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
