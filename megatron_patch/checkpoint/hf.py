"""Hugging Face checkpoint directories: safetensors read and written, the older `.bin` files read."""

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_patch.checkpoint.atomic import write_text
from megatron_patch.checkpoint.interface import Source, Target, Written
from megatron_patch.checkpoint.layouts import merge, part_shapes, same_bits, split
from megatron_patch.checkpoint.stream import Piece, Place, fill
from megatron_patch.checkpoint.unpickle import read_pt
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry, check_complete

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"  # read where there are no safetensors
SHARD_BYTES = 5 * 10**9
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors codes
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class HfSource:
    """An open directory: `files` maps each tensor to its memory-mapped file, `dtypes` to its type."""

    directory: Path
    config: ModelConfig
    files: Mapping[str, Any]
    dtypes: Mapping[str, torch.dtype]
    format: str = "hf"

    @property
    def dtype(self) -> torch.dtype:
        """The type of most tensors."""
        return Counter(self.dtypes.values()).most_common(1)[0][0]

    @property
    def layout(self) -> Mapping[str, int]:
        """Tensors are whole."""
        return {}

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """The type of `entry`'s parts, which all have the same."""
        return self.dtypes[entry.hf[0]]

    def parts(self, entry: Entry) -> list[Tensor]:
        """The tensors on disk, in the order of `entry.hf`."""
        return [self.files[name].get_tensor(name) for name in entry.hf]

    def assemble(self, entry: Entry, parts: list[Tensor]) -> Tensor:
        """Merged as the layout says."""
        return merge(entry, parts, self.config)

    def read(self, entry: Entry) -> Tensor:
        """The full mcore tensor, `entry.shape`; its pages are the file's where nothing is reordered."""
        return self.assemble(entry, self.parts(entry))

    def describe(self) -> str:
        """One phrase for the log."""
        return f"hf, {len(self.files)} tensors, {str(self.dtype).removeprefix('torch.')}"


def open_hf(directory: Path, entries: list[Entry], config: ModelConfig) -> HfSource:
    """Open `directory` and hold every tensor's name, shape and type against `entries`.

    Raises ValueError or FileNotFoundError in one sentence. With tied embeddings an `lm_head.weight` on disk must
    equal the embedding, and is not read again.
    """
    files = _open_tensors(directory)
    tied = files.pop(_OUTPUT, None) if config.share_embeddings_and_output_weights else None
    check_complete((name for entry in entries for name in entry.hf), files, str(directory))
    dtypes: dict[str, torch.dtype] = {}
    for entry in entries:
        for name, shape in zip(entry.hf, part_shapes(entry, config), strict=True):
            dtypes[name] = _checked_dtype(directory, name, files[name], shape)
        if len({dtypes[name] for name in entry.hf}) > 1:
            raise ValueError(f"{directory}: {', '.join(entry.hf)} become one tensor but differ in dtype")
    if tied is not None and not same_bits(files[_EMBEDDING].get_tensor(_EMBEDDING), tied.get_tensor(_OUTPUT)):
        raise ValueError(
            f"{directory}: tie_word_embeddings is true, but {_OUTPUT} differs from {_EMBEDDING}; set it to false"
        )
    return HfSource(directory, config, {name: files[name] for name in dtypes}, dtypes)


def holds_hf(directory: Path) -> bool:
    """Whether `directory` looks like a Hugging Face checkpoint."""
    return any((directory / name).is_file() for name in (SINGLE, INDEX, BIN, BIN_INDEX))


def write_hf(directory: Path, entries: list[Entry], config: ModelConfig, source: Source, target: Target) -> Written:
    """Write every Hugging Face tensor; the layout of `target` has no meaning here.

    One `model.safetensors`, or numbered files of at most SHARD_BYTES and their index.
    """
    pieces = {
        name: Piece(entry, shape, functools.partial(_part, config=config, index=index))
        for entry in entries
        for index, (name, shape) in enumerate(zip(entry.hf, part_shapes(entry, config), strict=True))
    }
    sizes = {name: math.prod(piece.shape) * source.dtype_of(piece.entry).itemsize for name, piece in pieces.items()}
    shards = _plan_shards(sizes, SHARD_BYTES)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    places = []
    for file_name, shard in zip(names, shards, strict=True):
        places += _lay_out(directory / file_name, {name: pieces[name] for name in shard}, source)
    written = fill(places, source)
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": written.bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")
    return dataclasses.replace(written, tensors=len(pieces))


def _part(entry: Entry, whole: Tensor, config: ModelConfig, index: int) -> Tensor:
    return split(entry, whole, config)[index]


@dataclass(frozen=True)
class _BinFile:
    """A memory-mapped `.bin` file with the methods of an open safetensors file."""

    tensors: Mapping[str, Tensor]

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def _open_tensors(directory: Path) -> dict[str, Any]:
    """Every tensor name in the directory and the open file that holds it."""
    is_bin = not any((directory / name).is_file() for name in (SINGLE, INDEX))
    single, index, open_file = (BIN, BIN_INDEX, _open_bin) if is_bin else (SINGLE, INDEX, _open_safetensors)
    weight_map = _weight_map(directory, single, index)
    opened: dict[str, Any] = {}
    for file_name in sorted(set(weight_map.values())) if weight_map else [single]:
        path = directory / file_name
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        file = open_file(path)
        for name in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
            if name in opened:
                raise ValueError(f"{path}: {name} is in another file too")
            if weight_map and weight_map.get(name) != file_name:
                raise ValueError(f"{path} holds {name}, which {index} does not place there")
            opened[name] = file
    lost = [name for name in weight_map if name not in opened]
    if lost:
        raise ValueError(f"{directory / weight_map[lost[0]]} lacks {lost[0]}, which {index} places there")
    return opened


def _weight_map(directory: Path, single: str, index: str) -> dict[str, str]:
    """The index's tensor → file table; empty for a single file."""
    path = directory / index
    if not path.is_file():
        return {}
    if (directory / single).is_file():
        raise ValueError(f"{directory} holds both {single} and {index}; remove the one that is out of date")
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = dict(weight_map.items())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of tensors: {error!r}") from None
    if not pairs:
        raise ValueError(f"{path} names no tensor")
    for file_name in pairs.values():
        if not isinstance(file_name, str) or not _is_plain(file_name):
            raise ValueError(f"{path} names {file_name!r}; shards must be plain file names in the same directory")
    return pairs


def _is_plain(file_name: str) -> bool:
    return bool(file_name) and Path(file_name).name == file_name != ".." and file_name.isprintable()


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not safetensors: {error}") from None


def _open_bin(path: Path) -> _BinFile:
    tensors = read_pt(path)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise ValueError(f"{path} is not a dict of tensors; save model.state_dict() alone")
    return _BinFile(tensors)


def _checked_dtype(directory: Path, name: str, file: Any, shape: tuple[int, ...]) -> torch.dtype:
    if isinstance(file, _BinFile):
        tensor = file.get_tensor(name)
        found, code = tuple(tensor.shape), _CODES.get(tensor.dtype, str(tensor.dtype))
    else:
        header = file.get_slice(name)
        found, code = tuple(header.get_shape()), header.get_dtype()
    if found != shape:
        raise ValueError(f"{directory}: {name} has shape {found}, config.json implies {shape}")
    if code not in DTYPES:
        raise ValueError(f"{directory}: {name} is {code}; supported are {', '.join(DTYPES)}")
    return DTYPES[code]


def _plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Consecutive tensors packed into files of at most `limit` bytes; a larger tensor stands alone."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _lay_out(path: Path, pieces: Mapping[str, Piece], source: Source) -> Iterator[Place]:
    """Write a safetensors file's header and give it its length."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, piece in pieces.items():
        dtype = source.dtype_of(piece.entry)
        start, end = end, end + math.prod(piece.shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(piece.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    for name, piece in pieces.items():
        yield Place(path, 8 + len(text) + header[name]["data_offsets"][0], piece)


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"
