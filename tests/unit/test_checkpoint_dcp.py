"""Pieces of any cut are boxes that tile their parameter, torch reads what is written, and damage is named."""

import itertools
import json
import shutil

import pytest
import torch
from tiny_checkpoint import CONFIG, ENTRIES, hf_tensors, write_directory
from torch.distributed import checkpoint as torch_dcp

from megatron_patch.checkpoint.dcp import TensorBox, checksum, damage, write_boxes
from megatron_patch.checkpoint.dcp_boxes import piece_boxes, shard_region
from megatron_patch.checkpoint.dcp_source import open_dcp, read_region
from megatron_patch.checkpoint.distcp import read_index
from megatron_patch.checkpoint.formats import FORMATS, detect_format
from megatron_patch.checkpoint.hf import open_hf
from megatron_patch.checkpoint.layouts import cut
from megatron_patch.convert import main
from megatron_patch.families.manifest import Entry
from megatron_patch.parallel.progress import Progress


def entry(shape, layout="copy", shard=None):
    return Entry(mcore="x", hf=("x",), layout=layout, shard=shard, shape=shape, layer=None)


KINDS = {
    "a norm": entry((13,)),
    "a replicated matrix": entry((6, 5)),
    "columns": entry((12, 5), shard="column"),
    "a bias of columns": entry((12,), shard="column"),
    "rows": entry((7, 12), shard="row"),
    "gate and up": entry((24, 3), "gate_up", "column"),
    "queries, keys and values": entry((24, 3), "qkv", "column"),
    "a vocabulary that does not divide": entry((13, 3), shard="vocab"),
    "a vocabulary smaller than its padding": entry((5, 2), shard="vocab"),
}


def cut_pieces(kind, tp, fsdp):
    """Every rank's piece of the numbers of a parameter, as `cut` and torch.chunk make it, and its boxes."""
    numbers = torch.arange(1, 1 + torch.Size(kind.shape).numel()).view(kind.shape)
    for rank, part in itertools.product(range(tp), range(fsdp)):
        shard = cut(kind, numbers, rank, tp)
        pieces = [*shard.chunk(fsdp), *[shard[:0]] * fsdp][:fsdp]
        start, shape = shard_region(shard.shape, [(0, part, fsdp)])
        assert shape == pieces[part].shape
        yield rank, pieces[part], piece_boxes(kind, rank, tp, start, shape)


@pytest.mark.parametrize("name", KINDS)
def test_the_boxes_of_all_pieces_make_up_the_parameter(name):
    kind = KINDS[name]
    for tp, fsdp in itertools.product((1, 2, 4), (1, 2, 3, 5)):
        whole = torch.zeros(kind.shape, dtype=torch.int64)
        for rank, piece, boxes in cut_pieces(kind, tp, fsdp):
            assert len(boxes) <= (2 if kind.layout == "gate_up" else 1)
            for box in boxes:
                place = tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
                if kind.shard is not None or rank == 0:  # the others hold copies
                    assert not whole[place].any(), "an element in two boxes"
                    whole[place] = piece[box.local]
                assert torch.equal(whole[place], piece[box.local])
        assert torch.equal(whole.flatten(), torch.arange(1, 1 + whole.numel())), (tp, fsdp)


def test_a_piece_across_gate_and_up_is_two_boxes_and_one_past_the_end_none():
    kind = KINDS["gate and up"]
    assert len(piece_boxes(kind, 1, 2, (4, 0), (4, 3))) == 2  # of rank 1's 6 gate and 6 up rows, 2 and 2
    assert piece_boxes(kind, 1, 2, (12, 0), (0, 3)) == []
    assert piece_boxes(KINDS["a vocabulary smaller than its padding"], 3, 4, (0, 0), (2, 2)) == []


def tensors():
    torch.manual_seed(0)
    return {e.mcore: torch.randn(e.shape) for e in ENTRIES}


def boxes_of(values, tp=1, fsdp=1):
    for e in ENTRIES:
        for rank, part in itertools.product(range(tp if e.shard else 1), range(fsdp)):
            shard = cut(e, values[e.mcore], rank, tp)
            start, shape = shard_region(shard.shape, [(0, part, fsdp)])
            for box in piece_boxes(e, rank, tp, start, shape):
                piece = shard[start[0] : start[0] + shape[0]]
                yield TensorBox(e.mcore, e.shape, box.start, piece[box.local].clone())


def write(root, values, tp=1, fsdp=1, extra=()):
    """An iteration as training leaves it."""
    directory = root / "iter_0000003"
    directory.mkdir(parents=True)
    write_boxes(directory, [*boxes_of(values, tp, fsdp), *extra], Progress())
    files = {path.name: checksum(path) for path in directory.iterdir()}
    (directory / "run.json").write_text(json.dumps({"files": files}))
    (root / "latest_checkpointed_iteration.txt").write_text("3")
    return directory


@pytest.mark.parametrize(("tp", "fsdp"), [(1, 1), (2, 3)])
def test_torch_itself_reads_what_is_written(tp, fsdp, tmp_path):
    values = tensors()
    directory = write(tmp_path, values, tp, fsdp)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    torch_dcp.load(loaded, checkpoint_id=directory, no_dist=True)
    assert all(torch.equal(loaded[name], values[name]) for name in values)


@pytest.mark.parametrize(("tp", "fsdp"), [(1, 1), (2, 3)])
def test_whole_parameters_and_any_region_are_read_from_the_boxes(tp, fsdp, tmp_path):
    values = tensors()
    moments = TensorBox("optimizer.exp_avg.x", (3,), (0,), torch.ones(3))
    directory = write(tmp_path, values, tp, fsdp, [moments, TensorBox("random.cpu", (1, 4), (0, 0), torch.ones(1, 4))])
    assert detect_format(tmp_path).name == "dcp"
    source = open_dcp(tmp_path, ENTRIES, CONFIG)
    assert all(torch.equal(source.read(e), values[e.mcore]) for e in ENTRIES)
    assert source.describe() == "dcp iter_0000003, float32"
    index = read_index(directory)
    for name, whole in values.items():
        start = tuple(size // 3 for size in whole.shape)
        out = torch.full([size - first for size, first in zip(whole.shape, start, strict=True)], 7.0)
        read_region(name, index[name], start, out)
        assert torch.equal(out, whole[tuple(slice(first, None) for first in start)])


def test_boxes_that_do_not_tile_their_tensor_are_never_written(tmp_path):
    half = TensorBox("x", (4,), (0,), torch.ones(2))
    with pytest.raises(AssertionError, match="x: 2 of 4 elements are written"):
        write_boxes(tmp_path, [half], Progress())


def test_a_region_that_is_stored_in_part_is_told(tmp_path):
    directory = write(tmp_path, tensors())
    stored = read_index(directory)[ENTRIES[0].mcore]
    with pytest.raises(ValueError, match=r"x: 16 of the 32 elements from \(20, 0\) on are stored"):
        read_region("x", stored, (20, 0), torch.zeros(2, 16))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [(cut_short, "bytes were written|were written"), (flip_a_bit, "is damaged"), (lambda p: p.unlink(), "not exist")],
)
def test_a_file_that_has_changed_is_named(harm, message, name, tmp_path):
    directory = write(tmp_path, tensors())
    files = json.loads((directory / "run.json").read_text())["files"]
    assert damage(directory, files, sorted(files)) is None
    harm(directory / name)
    assert name in damage(directory, files, sorted(files))
    with pytest.raises(ValueError, match=rf"{name}.*({message})"):
        open_dcp(tmp_path, ENTRIES, CONFIG)


def test_a_full_disk_is_told_as_one(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (512, 30_000):  # inside the head of a box, and inside its values
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="rank 0: File too large"):
                write_boxes(tmp_path / str(size), [TensorBox("x", (90_000,), (0,), torch.ones(90_000))], Progress())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_converter_reads_what_training_wrote_and_writes_it_too(tmp_path):
    original = write_directory(tmp_path / "hf", hf_tensors())
    assert main([str(original), str(tmp_path / "own"), "--format", "dcp", "--verify"]) == 0
    assert detect_format(tmp_path / "own").name == "dcp"
    values = {e.mcore: open_hf(original, ENTRIES, CONFIG).read(e) for e in ENTRIES}
    trained = write(tmp_path / "trained", values, tp=2, fsdp=3).parent
    shutil.copy(original / "config.json", trained)
    for source in (tmp_path / "own", trained):
        assert main([str(source), str(tmp_path / "back"), "--format", "hf", "--overwrite", "--verify"]) == 0
        back = open_hf(tmp_path / "back", ENTRIES, CONFIG)
        assert all(torch.equal(back.read(e), values[e.mcore]) for e in ENTRIES)


def test_torch_dist_and_dcp_are_told_apart(tmp_path):
    original = write_directory(tmp_path / "hf", hf_tensors())
    for name in ("torch_dist", "dcp"):
        assert main([str(original), str(tmp_path / name), "--format", name]) == 0
        assert detect_format(tmp_path / name).name == name
    assert list(FORMATS).index("dcp") < list(FORMATS).index("torch_dist")
