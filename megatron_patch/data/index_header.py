"""The header of a `.bin/.idx` pair: counts, token type and total, read without numpy so that a plan can afford it.

Layout (little-endian, unpadded; the Megatron indexed dataset): 9 magic bytes, u64 version, u8 token type, u64 sequence
count S, u64 length D of the document array; then int32[S] lengths in tokens, int64[S] offsets in bytes into `.bin`,
int64[D] document boundaries (first 0, last S) and, in multimodal files only, int8[S] modes.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
INSTRUCTION_FIELDS = ("input_ids", "attention_mask", "labels")
ITEM_SIZES = {"uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "float64": 8, "float32": 4, "uint16": 2}


@dataclass(frozen=True)
class IndexHeader:
    """What a pair holds. `documents` counts empty ones; `sequences` are what sample indices are made of."""

    prefix: str
    dtype: str
    sequences: int
    documents: int
    tokens: int


def read_header(prefix: str | os.PathLike[str]) -> IndexHeader:
    """Read and check the header of `prefix`.idx and the size of `prefix`.bin (no token is read).

    Raises FileNotFoundError for a missing file, ValueError for a file that is no index, is truncated, or contradicts
    its `.bin`.
    """
    prefix = os.fspath(prefix)
    _check_files(prefix)
    with Path(f"{prefix}.idx").open("rb") as file:
        dtype, sequences, boundaries = _read_counts(file, prefix)
        _check_index_size(prefix, sequences, boundaries)
        expected = _end_of_tokens(file, sequences, ITEM_SIZES[dtype])
        covered = _last_boundary(file, sequences, boundaries)
    if covered != sequences:
        raise ValueError(f"{prefix}.idx: its documents cover {covered} sequences of {sequences}; rebuild the dataset")
    actual = Path(f"{prefix}.bin").stat().st_size
    if actual != expected:
        raise ValueError(
            f"{prefix}.bin has {actual} bytes, but {prefix}.idx describes {expected}; "
            "the pair is truncated or comes from two different runs, rebuild it"
        )
    return IndexHeader(prefix, dtype, sequences, boundaries - 1, actual // ITEM_SIZES[dtype])


def check_sample_documents(header: IndexHeader, seq_length: int) -> None:
    """Raise ValueError unless a fine-tuning dataset holds `seq_length` tokens and as many labels per sequence."""
    if header.dtype not in ("int32", "int64"):
        raise ValueError(
            f"{header.prefix} is of {header.dtype}, which cannot hold the label -100 of what is not learned; build "
            "it for fine-tuning with toolkits/sft_data_preprocessing"
        )
    if not header.sequences:
        raise ValueError(f"{header.prefix} holds no sample; build it again")
    if header.tokens != 2 * seq_length * header.sequences:
        found, rest = divmod(header.tokens, 2 * header.sequences)
        what = "of different lengths, so it is not for fine-tuning" if rest else f"of 2 × {found} numbers"
        raise ValueError(
            f"{header.prefix} has samples {what}; with SEQ_LEN {seq_length} they must be 2 × {seq_length}, tokens and "
            "labels: build it with that SEQ_LEN, or train with its own"
        )


def instruction_prefixes(prefix: str) -> tuple[str, ...]:
    """The pairs of ModelLink's instruction data, which is named without `_packed_`; `packed` means three together."""
    return tuple(f"{prefix}_packed_{field}_document" for field in INSTRUCTION_FIELDS)


def check_instruction_files(prefix: str) -> IndexHeader:
    """The header of the tokens of instruction data, having checked that the other two pairs are beside it.

    Raises what `read_header` raises, and ValueError for pairs of different sizes or labels that cannot be -100.
    """
    name, is_field, _ = prefix.partition("_packed_")
    if is_field and not Path(f"{instruction_prefixes(prefix)[0]}.idx").exists():
        raise FileNotFoundError(f"instruction dataset {prefix!r}: give its prefix without _packed_…: {name}")
    ids, mask, labels = map(read_header, instruction_prefixes(prefix))
    for other in (mask, labels):
        if (other.sequences, other.tokens) != (ids.sequences, ids.tokens):
            raise ValueError(
                f"{ids.prefix} has {ids.sequences} samples of {ids.tokens} tokens, {other.prefix} {other.sequences} of "
                f"{other.tokens}; the files come from two different runs, preprocess again"
            )
    if labels.dtype.startswith("u"):
        raise ValueError(f"{labels.prefix} is of {labels.dtype}, which cannot hold the label -100; preprocess again")
    if not ids.sequences:
        raise ValueError(f"{ids.prefix} holds no sample; preprocess again")
    return ids


def smallest_dtype(vocabulary_size: int) -> str:
    """Token type of a new dataset: as in Megatron uint16 below 65500 entries (added tokens too), else int32."""
    return "uint16" if vocabulary_size < 65500 else "int32"


def _check_files(prefix: str) -> None:
    for suffix in (".idx", ".bin"):
        if not Path(prefix + suffix).is_file():
            hint = _hint(prefix) if suffix == ".idx" else ""
            raise FileNotFoundError(f"dataset {prefix!r}: {prefix}{suffix} does not exist{hint}")


def _hint(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return f"; give the prefix without its suffix: {prefix[:-4]}"
    path = Path(prefix)
    found = sorted(path.parent.glob(f"{path.name}*.idx")) if path.name and path.parent.is_dir() else []
    return f"; did you mean {str(found[0])[:-4]}?" if found else ""


def _read_counts(file: BinaryIO, prefix: str) -> tuple[str, int, int]:
    head = file.read(HEADER_BYTES)
    if head[:9] != MAGIC:
        raise ValueError(f"{prefix}.idx is not a Megatron index (its first bytes are {head[:9]!r})")
    if len(head) < HEADER_BYTES:
        raise ValueError(f"{prefix}.idx is truncated: {len(head)} bytes, the header alone has {HEADER_BYTES}")
    version, code, sequences, boundaries = struct.unpack("<QBQQ", head[9:])
    if version != VERSION:
        raise ValueError(f"{prefix}.idx has version {version}; version {VERSION} is read here")
    names = {number: name for name, number in CODES.items()}
    if code not in names:
        raise ValueError(f"{prefix}.idx has token type {code}; known are 1 to {max(names)}")
    if names[code].startswith("float"):
        raise ValueError(f"{prefix}.idx has token type {names[code]}; tokens are whole numbers")
    if boundaries < 1:
        raise ValueError(f"{prefix}.idx has no document boundaries; rebuild the dataset")
    return names[code], sequences, boundaries


def _check_index_size(prefix: str, sequences: int, boundaries: int) -> None:
    actual = Path(f"{prefix}.idx").stat().st_size
    expected = HEADER_BYTES + 12 * sequences + 8 * boundaries
    if actual not in (expected, expected + sequences):  # multimodal files end with one mode per sequence
        state = "truncated" if actual < expected else "too long"
        raise ValueError(f"{prefix}.idx is {state}: {actual} bytes, its header describes {expected}; rebuild it")


def _end_of_tokens(file: BinaryIO, sequences: int, item_size: int) -> int:
    if not sequences:
        return 0
    file.seek(HEADER_BYTES + 4 * (sequences - 1))
    (length,) = struct.unpack("<i", file.read(4))
    file.seek(HEADER_BYTES + 4 * sequences + 8 * (sequences - 1))
    (offset,) = struct.unpack("<q", file.read(8))
    return offset + length * item_size


def _last_boundary(file: BinaryIO, sequences: int, boundaries: int) -> int:
    file.seek(HEADER_BYTES + 12 * sequences + 8 * (boundaries - 1))
    return struct.unpack("<q", file.read(8))[0]
