"""Tokens on disk: reader and writer of `.bin/.idx` pairs, byte-compatible with Megatron's indexed dataset."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_patch.data.index_header import CODES, HEADER_BYTES, MAGIC, VERSION, read_header

SUFFIXES = (".bin", ".idx", ".json")
_TEMPORARY = re.compile(r"\.(?:bin|idx|json)\.([0-9]+)\.tmp")  # with the process that writes it
DOCUMENTS_AT_ONCE = 1024  # while appending a dataset


class IndexedDataset:
    """Memory-mapped sequences of tokens; what is returned are views that outlive the dataset.

    Raises what `read_header` raises, and ValueError for lengths or offsets that leave the `.bin` file.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        header = read_header(prefix)
        self.prefix = header.prefix
        index = np.memmap(f"{header.prefix}.idx", mode="r", dtype=np.uint8).view(np.ndarray)
        count, lengths_end = header.sequences, HEADER_BYTES + 4 * header.sequences
        # A copy, because the mapped array is unaligned and every sample index is made from it.
        self.sequence_lengths = index[HEADER_BYTES:lengths_end].view("<i4").copy()
        self._offsets = index[lengths_end : lengths_end + 8 * count].view("<i8")
        boundaries = index[lengths_end + 8 * count :][: 8 * (header.documents + 1)]
        self.document_indices = boundaries.view("<i8")
        self._item_size = np.dtype(header.dtype).itemsize
        self._tokens = _mapped_tokens(header.prefix, header.dtype, header.tokens)
        self._check_offsets()

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, sequence: int) -> npt.NDArray:
        return self.get(sequence)

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> npt.NDArray:
        """`length` tokens (or the rest) of a sequence from token `offset`, without copying."""
        start = int(self._offsets[sequence]) // self._item_size
        end = start + int(self.sequence_lengths[sequence]) if length is None else start + offset + length
        return self._tokens[start + offset : end]

    def _check_offsets(self) -> None:
        ends = self._offsets + self.sequence_lengths.astype(np.int64) * self._item_size
        bad = (self.sequence_lengths < 0) | (self._offsets < 0) | (ends > self._tokens.nbytes)
        if bad.any():
            raise ValueError(f"{self.prefix}.idx: sequence {int(bad.argmax())} lies outside {self.prefix}.bin")


class IndexedDatasetBuilder:
    """Writes a pair. Both files appear when `finalize` returns; left by an exception, nothing does. What an earlier
    process of this machine left that was killed is removed first.

    Use as a context manager: leaving it without an exception finalizes what is not complete.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: str) -> None:
        if dtype not in CODES:
            raise ValueError(f"token type {dtype!r} is not one of {', '.join(CODES)}")
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = CODES[dtype]
        self._lengths: list[npt.NDArray] = []
        self._counts: list[npt.NDArray] = []
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        _sweep(self.prefix)
        self._bin = self._open(".bin")

    def add(
        self, tokens: npt.ArrayLike, sequence_lengths: Sequence[int], sequences_per_document: Sequence[int]
    ) -> None:
        """Append documents: their tokens in one run, each sequence's length, each document's number of sequences.

        A document may have no sequence. Raises ValueError for a token that the token type cannot hold (numpy would
        wrap it silently in older releases) or for counts that do not add up.
        """
        tokens = np.asarray(tokens)
        lengths, counts = np.asarray(sequence_lengths, np.int64), np.asarray(sequences_per_document, np.int64)
        if lengths.sum() != tokens.size or counts.sum() != lengths.size:
            raise ValueError(
                f"{self.prefix}: {tokens.size} tokens in sequences of {lengths.sum()}, "
                f"{lengths.size} sequences in documents of {counts.sum()}; they must be equal"
            )
        self._check_range(tokens)
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(lengths.astype("<i4"))
        self._counts.append(counts)

    def append(self, dataset: IndexedDataset) -> None:
        """Append every document of a dataset of the same token type."""
        bounds = dataset.document_indices
        for first in range(0, len(bounds) - 1, DOCUMENTS_AT_ONCE):
            part = bounds[first : first + DOCUMENTS_AT_ONCE + 1]
            sequences = range(int(part[0]), int(part[-1]))
            lengths = dataset.sequence_lengths[sequences.start : sequences.stop]
            tokens = np.concatenate([np.empty(0, self.dtype), *(dataset[k] for k in sequences)])
            self.add(tokens, lengths, np.diff(part))

    def complete(self, description: Mapping[str, Any] | None = None) -> None:
        """Write all that is missing, under temporary names; `description` is what the sidecar will say."""
        with self._bin:
            pass
        with self._open(".idx") as file:
            self._write_index(file)
        if description is not None:
            with self._open(".json") as file:
                text = json.dumps(description, indent=2, ensure_ascii=False)
                file.write(text.encode(errors="backslashreplace") + b"\n")  # a file's name may be no text

    def publish(self) -> None:
        """Put what is complete in place, replacing an earlier pair and its sidecar."""
        # An interruption between the renames must leave no pair, rather than a mixed one.
        for suffix in (".idx", ".json"):
            Path(f"{self.prefix}{suffix}").unlink(missing_ok=True)
        for suffix in (".json", ".bin", ".idx"):
            if self._temporary(suffix).exists():
                self._temporary(suffix).replace(f"{self.prefix}{suffix}")

    def finalize(self, description: Mapping[str, Any] | None = None) -> None:
        """Complete and publish."""
        self.complete(description)
        self.publish()

    def discard(self) -> None:
        """Remove whatever is not in place yet."""
        try:
            self._bin.close()
        finally:  # a full disk fails the closing, too
            for suffix in SUFFIXES:
                self._temporary(suffix).unlink(missing_ok=True)

    def __enter__(self) -> "IndexedDatasetBuilder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._bin.closed:
                self.finalize()
        finally:
            self.discard()

    def _write_index(self, file: BinaryIO) -> None:
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths])
        counts = np.concatenate([np.empty(0, np.int64), *self._counts])
        boundaries = np.concatenate([[0], np.cumsum(counts)]).astype("<i8")
        offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * self.dtype.itemsize
        file.write(MAGIC + VERSION.to_bytes(8, "little") + bytes([self._code]))
        file.write(lengths.size.to_bytes(8, "little") + boundaries.size.to_bytes(8, "little"))
        file.write(lengths.tobytes() + offsets.astype("<i8").tobytes() + boundaries.tobytes())

    def _check_range(self, tokens: npt.NDArray) -> None:
        if not tokens.size or self.dtype.kind == "f":
            return
        low, high = int(tokens.min()), int(tokens.max())
        allowed = np.iinfo(self.dtype)
        if low < allowed.min or high > allowed.max:
            worst = low if low < allowed.min else high
            raise ValueError(
                f"{self.prefix}: token {worst} does not fit {self.dtype.name} ({allowed.min} to {allowed.max})"
            )

    def _temporary(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}.{os.getpid()}.tmp")

    def _open(self, suffix: str) -> BinaryIO:
        return self._temporary(suffix).open("wb")


def _sweep(prefix: str) -> None:
    path = Path(prefix)
    for left in path.parent.glob(f"{escape(path.name)}.*.tmp"):
        match = _TEMPORARY.fullmatch(left.name.removeprefix(path.name))
        if match and not _is_alive(int(match[1])):
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _mapped_tokens(prefix: str, dtype: str, count: int) -> npt.NDArray:
    kind = np.dtype(dtype).newbyteorder("<")
    if not count:  # an empty file cannot be mapped
        return np.empty(0, kind)
    return np.memmap(f"{prefix}.bin", mode="r", dtype=kind).view(np.ndarray)
