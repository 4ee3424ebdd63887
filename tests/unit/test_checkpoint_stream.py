import argparse
import dataclasses
import errno
import functools
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoint import CONFIG, ENTRIES

from megatron_patch.checkpoint import rows, stream
from megatron_patch.checkpoint.cast import Cast
from megatron_patch.checkpoint.layouts import cut, join, merge, part_shapes, shard_shape, split
from megatron_patch.checkpoint.rows import trace
from megatron_patch.checkpoint.stream import Piece, Stack, read_chunks, write_pt
from megatron_patch.families.manifest import Entry

QKV_BIAS = Entry("b", ("q", "k", "v"), "qkv", "column", (32,), 0)
EVERY_KIND = {
    "embedding, vocabulary padded": ENTRIES[0],
    "qkv": next(entry for entry in ENTRIES if entry.layout == "qkv"),
    "gate and up": next(entry for entry in ENTRIES if entry.layout == "gate_up"),
    "cut in columns of x": next(entry for entry in ENTRIES if entry.shard == "row"),
    "norm": next(entry for entry in ENTRIES if len(entry.shape) == 1),
    "bias of qkv": QKV_BIAS,
}
every_kind = pytest.mark.parametrize("entry", EVERY_KIND.values(), ids=EVERY_KIND)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A source of one parameter: `held` parts, put together by `assemble`."""

    held: list
    assemble: object

    def dtype_of(self, entry):
        return self.held[0].dtype

    def parts(self, entry):
        return self.held

    def read(self, entry):
        return self.assemble(entry, self.held)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A source that knows whole tensors only."""

    tensors: dict

    def dtype_of(self, entry):
        return self.tensors[entry.mcore].dtype

    def read(self, entry):
        return self.tensors[entry.mcore]


def random(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def from_hf(entry):
    parts = [random(shape) for shape in part_shapes(entry, CONFIG)]
    return Stored(parts, lambda entry, parts: merge(entry, parts, CONFIG))


def from_ranks(entry, size):
    whole = random(entry.shape)
    return Stored([cut(entry, whole, rank, size) for rank in range(size)] if entry.shard else [whole], join)


def as_one(pieces, source, path):
    write_pt([(path, {"model": {str(index): piece for index, piece in enumerate(pieces)}})], source)
    return list(torch.load(path, weights_only=True)["model"].values())


@every_kind
@pytest.mark.parametrize("size", [1, 2])
def test_what_is_merged_and_cut_on_the_way_equals_what_is_merged_and_cut(tmp_path, entry, size):
    source = from_hf(entry)
    pieces = [Piece(entry, shard_shape(entry, size), functools.partial(_cut, rank=r, size=size)) for r in range(size)]
    for rank, found in enumerate(as_one(pieces, source, tmp_path / "a.pt")):
        assert torch.equal(found, cut(entry, source.read(entry), rank, size))


def _cut(entry, whole, rank, size):
    return cut(entry, whole, rank, size)


@every_kind
@pytest.mark.parametrize("size", [1, 2])
def test_what_is_joined_and_split_on_the_way_equals_what_is_joined_and_split(tmp_path, entry, size):
    source = from_ranks(entry, size)
    pieces = [
        Piece(entry, shape, lambda entry, whole, index=index: split(entry, whole, CONFIG)[index])
        for index, shape in enumerate(part_shapes(entry, CONFIG))
    ]
    wanted = split(entry, source.read(entry), CONFIG)
    found = as_one(pieces, source, tmp_path / "a.pt")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_columns_cut_for_four_ranks_are_joined_for_three(tmp_path):
    entry = Entry("proj", ("o",), "copy", "row", (5, 24), 0)
    source = from_ranks(entry, 4)
    pieces = [Piece(entry, (5, 8), functools.partial(_cut, rank=rank, size=3)) for rank in range(3)]
    assert torch.equal(torch.cat(as_one(pieces, source, tmp_path / "a.pt"), 1), random((5, 24)))


@every_kind
def test_rearranging_is_never_run_on_the_data(entry, tmp_path):
    seen = []

    def make(entry, whole):
        seen.append(whole)
        return cut(entry, whole, 1, 2)

    as_one([Piece(entry, shard_shape(entry, 2), make)], from_hf(entry), tmp_path / "a.pt")
    assert seen and all(whole.dtype == torch.int32 for whole in seen)


def test_rows_that_stay_together_move_together():
    entry = EVERY_KIND["gate and up"]
    parts = [random(shape) for shape in part_shapes(entry, CONFIG)]
    bands = trace(entry, parts, entry.shape, lambda entry, parts: merge(entry, parts, CONFIG))
    assert [(band.start, band.stop) for band in bands] == [(0, 24), (24, 48)]
    assert all(band.stored(parts) is not None for band in bands), "nothing is gathered"


@every_kind
def test_bands_do_not_end_where_a_block_of_row_numbers_does(entry, monkeypatch):
    parts = [cut(entry, random(entry.shape), rank, 2) for rank in range(2)] if entry.shard else [random(entry.shape)]
    at_once = trace(entry, parts, entry.shape, join)
    for size in (1, 3, 7):
        monkeypatch.setattr(rows, "BLOCK_ROWS", size)
        assert trace(entry, parts, entry.shape, join) == at_once


def test_row_numbers_take_at_most_half_of_the_tensor_however_narrow_and_tall(monkeypatch):
    monkeypatch.setattr(rows, "MOST_NUMBERS", 100)
    numbers = []

    def joined(entry, parts):
        numbers.extend([*parts, join(entry, parts)])
        return numbers[-1]

    def bands_of(width):
        entry = Entry("e", ("e",), "copy", "vocab", (1999, width), None)
        return trace(entry, [torch.empty(500, width, dtype=torch.bfloat16)] * 4, entry.shape, joined)

    assert [(band.start, band.stop) for band in bands_of(8)] == [(0, 500), (500, 1000), (1000, 1500), (1500, 1999)]
    assert sum(number.nbytes for number in numbers) <= 2000 * 8 * 2 // 2
    assert bands_of(7) is None, "they would take more"


def test_a_transposed_tensor_is_made_in_full(tmp_path):
    entry = Entry("w", ("w",), "copy", None, (6, 4), 0)
    whole = random((6, 4))
    piece = Piece(entry, (4, 6), lambda entry, whole: whole.t())
    assert torch.equal(as_one([piece], Whole({"w": whole}), tmp_path / "a.pt")[0], whole.t())


def test_a_square_transposed_tensor_is_not_taken_for_moved_rows(tmp_path):
    entry = Entry("w", ("w",), "copy", None, (4, 4), 0)
    whole = random((4, 4))
    piece = Piece(entry, (4, 4), lambda entry, whole: whole.t())
    assert torch.equal(as_one([piece], Whole({"w": whole}), tmp_path / "a.pt")[0], whole.t())


def test_columns_that_share_no_width_are_made_in_full(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_NUMBERS", 100)
    entry = Entry("proj", ("o",), "copy", "row", (20, 24), 0)
    pieces = [Piece(entry, (20, 8), functools.partial(_cut, rank=rank, size=3)) for rank in range(3)]
    assert torch.equal(torch.cat(as_one(pieces, from_ranks(entry, 4), tmp_path / "a.pt"), 1), random((20, 24)))


def test_a_stack_holds_its_pieces_one_after_the_other(tmp_path):
    experts = [Entry(f"e{i}", (f"e{i}",), "copy", None, (3, 4), 0, expert=i) for i in range(3)]
    tensors = {entry.mcore: random((3, 4)) + entry.expert for entry in experts}
    stack = Stack(tuple(Piece(entry, (3, 4), lambda entry, whole: whole) for entry in experts), (9, 4))
    assert torch.equal(as_one([stack], Whole(tensors), tmp_path / "a.pt")[0], torch.cat(list(tensors.values())))


def test_a_file_is_what_torch_save_would_have_written(tmp_path):
    """Names, types, shapes and everything around the tensors; read by torch with and without mapping."""
    entries = [Entry("a", ("a",), "copy", None, (3, 5), 0), Entry("b", ("b",), "copy", None, (7,), 0)]
    tensors = {"a": random((3, 5)).bfloat16(), "b": random((7,))}
    pieces = {entry.mcore: Piece(entry, entry.shape, lambda entry, whole: whole) for entry in entries}
    around = {"args": argparse.Namespace(num_layers=2, window_size=None), "checkpoint_version": 3.0, "iteration": 0}
    written = write_pt([(tmp_path / "new/a.pt", around | {"model": pieces, "model1": {}})], Whole(tensors))
    for mmap in (False, True):
        read = torch.load(tmp_path / "new/a.pt", weights_only=False, mmap=mmap)
        assert {key: value for key, value in read.items() if key != "model"} == around | {"model1": {}}
        assert all(torch.equal(read["model"][name], tensor) for name, tensor in tensors.items())
        assert read["model"]["a"].dtype == torch.bfloat16
    assert (written.tensors, written.bytes) == (2, 3 * 5 * 2 + 7 * 4)


def test_long_tensors_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 100)
    entry = EVERY_KIND["gate and up"]
    source = from_hf(entry)
    pieces = [Piece(entry, (24, 16), functools.partial(_cut, rank=rank, size=2)) for rank in range(2)]
    found = as_one(pieces, source, tmp_path / "a.pt")
    assert all(torch.equal(tensor, cut(entry, source.read(entry), rank, 2)) for rank, tensor in enumerate(found))
    chunks = list(read_chunks(source, entry))
    assert {len(chunk) for chunk in chunks} == {1} and torch.equal(torch.cat(chunks), source.read(entry))


@every_kind
def test_a_cast_rounds_on_the_way_as_it_does_in_full(tmp_path, entry):
    source = Cast(from_hf(entry), torch.bfloat16)
    pieces = [Piece(entry, shard_shape(entry, 2), functools.partial(_cut, rank=rank, size=2)) for rank in range(2)]
    for rank, found in enumerate(as_one(pieces, source, tmp_path / "a.pt")):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, cut(entry, source.source.read(entry), rank, 2).bfloat16())


def test_nan_is_written_and_named_and_infinity_is_not_nan(tmp_path):
    entries = [Entry(name, (name,), "copy", None, (4, 4), 0) for name in ("fine", "nan", "infinite")]
    tensors = {entry.mcore: random((4, 4)) for entry in entries}
    tensors["nan"][2, 3] = float("nan")
    tensors["infinite"][0] = torch.tensor([float("inf"), float("-inf"), 0, 0])
    pieces = {entry.mcore: Piece(entry, (4, 4), lambda entry, whole: whole) for entry in entries}
    assert write_pt([(tmp_path / "a.pt", pieces)], Whole(tensors)).nan == ("nan",)
    assert torch.load(tmp_path / "a.pt")["nan"].isnan().nonzero().tolist() == [[2, 3]]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    monkeypatch.setattr(os, "pwrite", None)
    with pytest.raises(OSError, match=r"the disk has 100 bytes free and 128 are needed") as error:
        as_one([_piece((4, 8))], Whole({"w": random((4, 8))}), tmp_path / "a.pt")
    assert error.value.errno == errno.ENOSPC


def test_a_disk_that_fills_up_stops_the_writing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"writing stopped: No space left on device: '.*a.pt'"):
        as_one([_piece((4, 8))], Whole({"w": random((4, 8))}), tmp_path / "a.pt")


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:5], offset))
    whole = random((4, 8))
    assert torch.equal(as_one([_piece((4, 8))], Whole({"w": whole}), tmp_path / "a.pt")[0], whole)


def _piece(shape):
    return Piece(Entry("w", ("w",), "copy", None, shape, 0), shape, lambda entry, whole: whole)
