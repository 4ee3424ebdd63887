"""The files of torch.distributed.checkpoint: global tensors that lie in boxes over `.distcp` files, and `.metadata`.

`.metadata` is a pickle, and so is the head of every box: both are read by the unpickler that runs nothing. Values are
mapped, and on the way out left blank for whoever fills them; torch's own reader and writer hold whole tensors.
"""

import io
import mmap
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo

from megatron_patch.checkpoint.disk import named_errors
from megatron_patch.checkpoint.mapping import map_pages
from megatron_patch.checkpoint.unpickle import Inert, RestrictedUnpickler, check_byte_order, reason, record_offset

INDEX, DATA = ".metadata", "__0_0.distcp"
_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.uint8: "ByteStorage",
}
_ALIGNMENT = 64  # torch aligns the values within a box so
_RECORDED = frozenset(
    f"{kind.__module__}.{kind.__qualname__}"
    for kind in (
        dcp.Metadata,
        dcp.TensorStorageMetadata,
        dcp.ChunkStorageMetadata,
        dcp.TensorProperties,
        dcp.MetadataIndex,
        StorageInfo,
    )
) | {"torch.distributed._shard.sharded_tensor.metadata.TensorProperties"}  # before torch 2.3


@dataclass(frozen=True)
class Box:
    """Part of a global tensor, by its first element and extent along every axis, and the bytes that hold it."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A global tensor and the boxes that make it up, in no order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Part:
    """What is wanted of a box, counted from its first element."""

    box: Box
    dtype: torch.dtype
    slices: tuple[slice, ...]


@dataclass(frozen=True)
class BlankBox:
    """A box to write: its tensor's name, its first element, and its extent along every axis of the tensor."""

    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class Record(Inert):
    """An instance of an index's class: it keeps what the pickle gives it and does nothing with it."""

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"state": state})


class IndexUnpickler(RestrictedUnpickler):
    """Knows an index's classes too, made afresh as records for each file."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._resolved |= {name: type(name.rpartition(".")[2], (Record,), {}) for name in _RECORDED}


class BoxUnpickler(RestrictedUnpickler):
    """Makes no tensor of a box's head, but the tuple that describes one: storage, offset, size, stride."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._resolved["torch._utils._rebuild_tensor_v2"] = lambda *description: description[:4]

    def find_class(self, module: str, name: str) -> Any:
        """A storage's class by its name alone."""
        return name if module == "torch" and name.endswith("Storage") else super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """The storage as it is described: its kind, record and number of elements."""
        return pid


def read_index(directory: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in `directory` by its name; objects that are no tensors are left out.

    Raises FileNotFoundError for a missing file and ValueError for an index that is damaged, names code, or places a
    tensor outside the directory or beyond a file's end.
    """
    path = directory / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    content = path.read_bytes()
    try:
        tensors = _tensors(directory, IndexUnpickler(io.BytesIO(content)).load())
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: {reason(error)}") from None
    except Exception as error:  # a damaged pickle raises whatever its last readable instruction leads to
        told = f"{type(error).__name__}: {reason(error)}"
        raise ValueError(f"{path} is truncated or not a torch.distributed.checkpoint index: {told}") from None
    for name, stored in tensors.items():
        _check_stored(path, name, stored)
    _check_files(path, tensors.values())
    return tensors


def boxes_by_position(stored: Stored, axes: int) -> dict[tuple[int, ...], list[Box]]:
    """The boxes that hold something of each position along the first `axes` axes."""
    found: dict[tuple[int, ...], list[Box]] = defaultdict(list)
    for box in stored.boxes:
        extent = zip(box.start[:axes], box.shape[:axes], strict=True)
        for position in product(*(range(start, start + size) for start, size in extent)):
            found[position].append(box)
    return found


def resolve_parts(
    boxes: Sequence[Box], dtype: torch.dtype, start: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[Part, ...]:
    """The parts of `boxes` that make up the region of a global tensor at `start`, in order along the axis that cuts it.

    Raises ValueError unless they hold every element of it once and one axis cuts it, as Megatron-Core's layouts do.
    """
    ends = tuple(a + n for a, n in zip(start, shape, strict=True))
    clipped = []
    for box in boxes:
        first = tuple(map(max, start, box.start))
        last = tuple(min(end, a + n) for end, a, n in zip(ends, box.start, box.shape, strict=True))
        if all(a < b for a, b in zip(first, last, strict=True)):
            clipped.append((first, last, box))
    clipped.sort(key=lambda part: part[0])
    cut = [a for a in range(len(shape)) if any((one[a], end[a]) != (start[a], ends[a]) for one, end, _ in clipped)]
    axis = cut[0] if cut else 0
    joints = [start[axis], *(last[axis] for _, last, _ in clipped)]
    if len(cut) > 1 or [first[axis] for first, _, _ in clipped] != joints[:-1] or joints[-1] != ends[axis]:
        raise ValueError(f"the {shape} elements from {start} on are not stored once each, cut along one axis at most")
    return tuple(
        Part(box, dtype, tuple(slice(a - o, b - o) for a, b, o in zip(first, last, box.start, strict=True)))
        for first, last, box in clipped
    )


def map_part(part: Part) -> Tensor:
    """The values, as pages of their file that are read when they are needed. Raises ValueError for a damaged box."""
    box = part.box
    try:
        with box.file.open("rb") as file:
            window = _Window(file, box)  # named, because the reader does not keep it alive
            reader = torch._C.PyTorchFileReader(window)
            storage, offset, size, stride = BoxUnpickler(io.BytesIO(reader.get_record("data.pkl"))).load()
            record, count = f"data/{storage[2]}", storage[4]
            check_byte_order(reader)
            if (storage[1], tuple(size)) != (_STORAGES[part.dtype], box.shape):
                raise pickle.UnpicklingError(f"{storage[1]} {tuple(size)}, but {INDEX} says {part.dtype} {box.shape}")
            before = box.offset % mmap.ALLOCATIONGRANULARITY
            first = before + record_offset(reader, record, count * part.dtype.itemsize)
            pages = map_pages(file, box.offset - before, before + box.length)
        values = torch.frombuffer(pages, dtype=part.dtype, count=count, offset=first)
        return values.as_strided(size, stride, offset)[part.slices]
    except PermissionError as error:
        raise PermissionError(error.errno, error.strerror, str(box.file)) from None
    except Exception as error:  # a damaged box raises whatever its last readable byte leads to
        raise ValueError(f"{box.file}: at byte {box.offset} stands no tensor to read: {reason(error)}") from None


def lay_out(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], boxes: Iterable[BlankBox], objects: Sequence[str]
) -> list[int]:
    """Write global tensors of `shapes` but for their values, and an empty object under every name in `objects`.

    `boxes` must tile their tensors. Returns where in `directory`/DATA the values of each go, in order. Raises
    ValueError where boxes of one tensor differ in type.
    """
    properties: dict[str, dcp.TensorProperties] = {}
    chunks: dict[str, list[dcp.ChunkStorageMetadata]] = defaultdict(list)
    storage: dict[dcp.MetadataIndex, StorageInfo] = {}
    skeletons: dict[tuple[tuple[int, ...], torch.dtype], tuple[bytes, int, bytes]] = {}
    offsets = []
    with named_errors(directory / DATA), (directory / DATA).open("wb") as file:
        for box in boxes:
            if properties.setdefault(box.name, dcp.TensorProperties(box.dtype)).dtype != box.dtype:
                told = f"{box.name} is one tensor for several layers or experts"
                raise ValueError(f"{told}, but their types differ; pass --dtype")
            kind = (box.shape, box.dtype)
            if kind not in skeletons:
                skeletons[kind] = _skeleton(directory / f"{DATA}.partial", *kind)
            head, size, tail = skeletons[kind]
            start = file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            file.write(head)
            offsets.append(file.tell())
            file.seek(size, os.SEEK_CUR)
            file.write(tail)
            storage[dcp.MetadataIndex(box.name, box.start)] = StorageInfo(DATA, start, file.tell() - start)
            chunks[box.name].append(dcp.ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.shape)))
        start = file.tell()
        torch.save([None], file)
        storage |= {dcp.MetadataIndex(name): StorageInfo(DATA, start, file.tell() - start) for name in objects}
    tensors = {
        name: dcp.TensorStorageMetadata(properties[name], torch.Size(shape), chunks[name])
        for name, shape in shapes.items()
    }
    _write_index(directory / INDEX, tensors | {name: dcp.BytesStorageMetadata() for name in objects}, storage)
    return offsets


def _write_index(path: Path, contents: dict[str, Any], storage: dict[dcp.MetadataIndex, StorageInfo]) -> None:
    with named_errors(path), path.open("wb") as file:
        pickle.dump(dcp.Metadata(contents, storage_data=storage, storage_meta=dcp.StorageMeta()), file)
        file.flush()
        os.fsync(file.fileno())


class _Window(io.RawIOBase):
    """The bytes of one box, as a file of their own."""

    def __init__(self, file: BinaryIO, box: Box) -> None:
        self._file, self._offset, self._length, self._position = file, box.offset, box.length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self._length - self._position, 0))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:wanted])
        self._position += count
        return count


def _skeleton(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, int, bytes]:
    """What torch.save writes before the values of a tensor, the size of its values, and what it writes after them."""
    with named_errors(path), torch.serialization.skip_data(), path.open("wb") as file:
        torch.save(torch.empty(shape, dtype=dtype), file)
    reader = torch._C.PyTorchFileReader(str(path))
    start, size = reader.get_record_offset("data/0"), reader.get_record_size("data/0")
    with path.open("rb") as file:
        head = file.read(start)
        file.seek(start + size)
        tail = file.read()
    path.unlink()
    return head, size, tail


def _tensors(directory: Path, index: Any) -> dict[str, Stored]:
    """The index's records as tensors, without any check of their values."""
    places = {
        (key.fqn, tuple(key.offset)): info
        for key, info in index.storage_data.items()
        if getattr(key, "offset", None) is not None
    }
    return {
        name: Stored(
            found.properties.state[0],
            tuple(found.size),
            tuple(_box(directory, chunk, places[name, tuple(chunk.offsets)]) for chunk in found.chunks),
        )
        for name, found in index.state_dict_metadata.items()
        if type(found).__name__ == dcp.TensorStorageMetadata.__name__
    }


def _box(directory: Path, chunk: Any, info: Any) -> Box:
    if getattr(info, "transform_descriptors", None):
        raise pickle.UnpicklingError(f"boxes are transformed by {info.transform_descriptors}; only plain ones are read")
    if not isinstance(info.relative_path, str) or Path(info.relative_path).name != info.relative_path:
        raise pickle.UnpicklingError(f"it names {info.relative_path!r}; boxes lie in files of the same directory")
    return Box(tuple(chunk.offsets), tuple(chunk.sizes), directory / info.relative_path, info.offset, info.length)


def _check_stored(path: Path, name: str, stored: Stored) -> None:
    numbers = [*stored.shape, *(n for box in stored.boxes for n in (*box.start, *box.shape, box.offset, box.length))]
    sound = isinstance(stored.dtype, torch.dtype) and all(type(number) is int and number >= 0 for number in numbers)
    for box in stored.boxes if sound else ():
        sound &= len(box.start) == len(box.shape) == len(stored.shape)
        sound &= all(a + n <= end for a, n, end in zip(box.start, box.shape, stored.shape, strict=False))
    if not sound:
        raise ValueError(f"{path}: the description of {name} is not that of a tensor")


def _check_files(path: Path, tensors: Iterable[Stored]) -> None:
    ends: dict[Path, int] = defaultdict(int)
    for stored in tensors:
        for box in stored.boxes:
            ends[box.file] = max(ends[box.file], box.offset + box.length)
    for file, end in ends.items():
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, but {path.name} names it")
        if file.stat().st_size < end:
            raise ValueError(f"{file} is truncated: {file.stat().st_size:,} bytes, {path.name} places {end:,} there")
