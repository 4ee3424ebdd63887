"""How many tokens a tokenizer's files define, added ones not counted: what transformers calls `vocab_size`."""

import json
from pathlib import Path

PIECES_FIELD = 1  # of sentencepiece's ModelProto: one length-delimited field per piece
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


def tokenizer_size(directory: Path) -> int | None:
    """Tokens of the tokenizer in `directory`; None where there is none. Raises ValueError for a damaged file."""
    for name, count in (
        ("tokenizer.json", lambda path: len(json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"])),
        ("vocab.json", lambda path: len(json.loads(path.read_text(encoding="utf-8")))),
        ("tokenizer.model", lambda path: count_pieces(path.read_bytes())),
    ):
        if (directory / name).is_file():
            try:
                return count(directory / name)
            except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{directory / name} is damaged: {error!r}") from None
    return None


def count_pieces(data: bytes) -> int:
    """Pieces of a serialised sentencepiece model. Raises ValueError where the bytes are no protocol buffer."""
    position, pieces = 0, 0
    while position < len(data):
        key, position = _varint(data, position)
        field, wire = key >> 3, key & 7
        if wire == VARINT:
            _, position = _varint(data, position)
        elif wire == BYTES:
            length, position = _varint(data, position)
            position += length
            pieces += field == PIECES_FIELD
        elif wire in (FIXED32, FIXED64):
            position += 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} at byte {position}: not a sentencepiece model")
    return pieces


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            return value, position
