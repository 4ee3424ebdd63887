"""Writing checkpoint files of any size in little memory: laid out first, then filled in place from mapped sources.

Several threads each take a parameter, see where its rows stand in the source (`rows.trace`), and copy them chunk by
chunk to every file that holds some of them. A file's length and the place of each tensor are known before any byte of
a tensor is read.
"""

import errno
import functools
import math
import os
import shutil
import struct
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_patch.checkpoint.cast import check_range, holds_nan
from megatron_patch.checkpoint.disk import named_errors
from megatron_patch.checkpoint.interface import PartedSource, Source, Written
from megatron_patch.checkpoint.rows import Band, Move, trace
from megatron_patch.families.manifest import Entry

CHUNK_BYTES = 4 << 20  # stays in a cache between being gathered, checked and written
WRITE_BYTES = 128 << 10  # Linux copies more at once into huge pages that it first has to find: up to 5 times slower


@dataclass(frozen=True)
class Piece:
    """A tensor of a file: `make(entry, whole)` of the full mcore tensor, `shape` large.

    `make` is a pure rearrangement. One that only moves whole rows and blocks of columns (`layouts.cut`, a part of
    `layouts.split`) is never run on the data; any other, such as a transposition, says `moves_rows=False` and gets the
    whole tensor in memory.
    """

    entry: Entry
    shape: tuple[int, ...]
    make: Callable[[Entry, Tensor], Tensor]
    moves_rows: bool = True


@dataclass(frozen=True)
class Stack:
    """A tensor of a file made of pieces one after the other, as grouped experts are; `shape` is the whole's."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where in a file a piece goes."""

    path: Path
    offset: int
    piece: Piece


def write_pt(files: Iterable[tuple[Path, Mapping[str, Any]]], source: Source) -> Written:
    """Write classic `.pt` files: dicts as `torch.save` takes them, with a Piece or Stack for each tensor.

    The largest thing in memory is a chunk, or one tensor where `make` has to run. Raises OSError when the disk is full,
    ValueError where pieces of one tensor differ in type.
    """
    places = [place for path, payload in files for place in _lay_out_pt(path, payload, source)]
    return fill(places, source)


def fill(places: list[Place], source: Source) -> Written:
    """Write every piece at its place in files that have their length already; they reach the disk before it returns."""
    by_entry: dict[str, list[Place]] = {}
    for place in places:
        by_entry.setdefault(place.piece.entry.mcore, []).append(place)
    total = sum(_bytes(place.piece, source) for place in places)
    paths = list(dict.fromkeys(place.path for place in places))
    if paths:
        check_space(paths[0].parent, total)
    nan: set[str] = set()
    locks = {path: threading.Lock() for path in paths}
    jobs = [functools.partial(_fill_entry, source, entry_places, locks, nan) for entry_places in by_entry.values()]
    run_in_threads(jobs, total, "writing")
    run_in_threads([functools.partial(_synchronise, path) for path in paths], 0, "flushing")
    return Written(len(by_entry), total, tuple(sorted(nan)))


def read_chunks(source: Source, entry: Entry) -> Iterator[Tensor]:
    """The rows of the full mcore tensor in pieces that its shape and type alone decide, so that two sources align."""
    parts, dtype = _parts(source, entry), source.dtype_of(entry)
    bands, held = _origins(source, Piece(entry, entry.shape, _itself), parts)
    width = math.prod(entry.shape[1:])
    rows = _chunk_rows(width, dtype)
    for start in range(0, entry.shape[0], rows):
        stop = min(start + rows, entry.shape[0])
        chunk = torch.empty(stop - start, width, dtype=dtype)
        for band in bands:
            first, last = max(start, band.start), min(stop, band.stop)
            if first < last:
                band.copy(held, first, last, chunk[first - start : last - start])
        yield chunk


def run_in_threads(jobs: list[Callable[[], int]], total: int, label: str) -> None:
    """Run `jobs` on every core and add up the bytes they return on a progress bar; the first error stops the rest."""
    pool = ThreadPoolExecutor(_cores(), initializer=torch.set_num_threads, initargs=(1,))
    bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, disable=not total or not _is_watched())
    try:
        futures: list[Future[int]] = [pool.submit(job) for job in jobs]
        for future in as_completed(futures):
            bar.update(future.result())
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def check_space(directory: Path, size: int) -> None:
    """Raise OSError unless the disk of `directory` has `size` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise OSError(errno.ENOSPC, f"the disk has {free:,} bytes free and {size:,} are needed", str(directory))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_watched() -> bool:
    return sys.stderr.isatty()


def _lay_out_pt(path: Path, payload: Mapping[str, Any], source: Source) -> Iterator[Place]:
    """Write all of the file but the tensors' bytes."""
    tensors: list[Piece | Stack] = []

    def blank(value: Any) -> Any:
        if isinstance(value, Piece | Stack):
            tensors.append(value)
            return torch.empty(value.shape, dtype=_dtype(value, source))  # never touched, so it takes no memory
        return {key: blank(item) for key, item in value.items()} if isinstance(value, dict) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    # a file of Python's own, because an error of torch's is not told apart from any other
    with named_errors(path), torch.serialization.skip_data(), path.open("wb") as file:
        torch.save(blank(payload), file)
    for tensor, (offset, size) in zip(tensors, _storages(path), strict=True):
        for piece in tensor.pieces if isinstance(tensor, Stack) else [tensor]:
            yield Place(path, offset, piece)
            offset += _bytes(piece, source)
            size -= _bytes(piece, source)
        if size:
            raise AssertionError(f"{path}: a tensor of {tensor.shape} was laid out {size} bytes too large")


def _storages(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and size of each storage in the order of pickling: torch numbers them so."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        for number in range(sum(name.startswith("data/") for name in records)):
            record = records[f"data/{number}"]
            file.seek(record.header_offset)
            name, extra = struct.unpack("<26x2H", file.read(30))  # lengths in the local header
            yield record.header_offset + 30 + name + extra, record.file_size


def _fill_entry(source: Source, places: list[Place], locks: Mapping[Path, threading.Lock], nan: set[str]) -> int:
    """Write one parameter everywhere it goes, and return the bytes written."""
    entry = places[0].piece.entry
    parts, dtype = _parts(source, entry), source.dtype_of(entry)
    done = 0
    for place in places:
        start = offset = place.offset
        with place.path.open("r+b", buffering=0) as file:
            for chunk in _chunks(*_origins(source, place.piece, parts), place.piece.shape, dtype):
                check_range(entry, chunk, was_rounded=parts[0].dtype != dtype)
                if holds_nan(chunk):
                    nan.add(entry.mcore)
                with locks[place.path]:  # the kernel has writers of one file spin, and they would take a core each
                    offset += _write(file.fileno(), place.path, chunk, offset)
        if offset - start != _bytes(place.piece, source):
            raise AssertionError(f"{entry.mcore}: {offset - start} bytes came for a piece of shape {place.piece.shape}")
        done += offset - start
    return done


def _origins(source: Source, piece: Piece, parts: list[Tensor]) -> tuple[list[Band], list[Tensor]]:
    """Where the rows of a piece are: in the stored parts, or in a tensor made for it."""
    assemble = source.assemble if isinstance(source, PartedSource) else _only

    def make(entry: Entry, parts: list[Tensor]) -> Tensor:
        return piece.make(entry, assemble(entry, parts))

    bands = trace(piece.entry, parts, piece.shape, make) if piece.moves_rows else None
    if bands is not None:
        return bands, parts
    made = make(piece.entry, parts).reshape(piece.shape[0], -1)
    everything = slice(0, made.shape[1])
    return [Band(0, len(made), (Move(everything, 0, 0, everything),))], [made]


def _chunks(bands: list[Band], parts: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows in order, in pieces of about CHUNK_BYTES; a view of the source where it has them as they are wanted."""
    width = math.prod(shape[1:])
    rows = _chunk_rows(width, dtype)
    for band in bands:
        stored = band.stored(parts)
        for start in range(band.start, band.stop, rows):
            stop = min(start + rows, band.stop)
            if stored is not None and stored.dtype == dtype:
                yield stored[start - band.start : stop - band.start]
            else:
                chunk = torch.empty(stop - start, width, dtype=dtype)
                band.copy(parts, start, stop, chunk)
                yield chunk


def _write(file: int, path: Path, chunk: Tensor, offset: int) -> int:
    data = memoryview(chunk.flatten().view(torch.uint8).numpy())
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(file, data[done : done + WRITE_BYTES], offset + done)
    except OSError as error:
        raise OSError(error.errno, f"writing stopped: {error.strerror}", str(path)) from None
    return done


def _synchronise(path: Path) -> int:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    return 0


def _parts(source: Source, entry: Entry) -> list[Tensor]:
    return source.parts(entry) if isinstance(source, PartedSource) else [source.read(entry)]


def _chunk_rows(width: int, dtype: torch.dtype) -> int:
    return max(1, CHUNK_BYTES // (width * dtype.itemsize))


def _itself(entry: Entry, whole: Tensor) -> Tensor:
    return whole


def _only(entry: Entry, parts: list[Tensor]) -> Tensor:
    return parts[0]


def _dtype(tensor: Piece | Stack, source: Source) -> torch.dtype:
    first, *others = (piece.entry for piece in (tensor.pieces if isinstance(tensor, Stack) else [tensor]))
    dtype = source.dtype_of(first)
    for entry in others:
        if source.dtype_of(entry) != dtype:
            told = f"{first.mcore} is {dtype} and {entry.mcore} {source.dtype_of(entry)}"
            raise ValueError(f"{told}; the target has one tensor for both, so pass --dtype")
    return dtype


def _bytes(piece: Piece, source: Source) -> int:
    return math.prod(piece.shape) * source.dtype_of(piece.entry).itemsize
