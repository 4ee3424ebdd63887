"""`.bin/.idx` pairs, against bytes that Megatron-Core wrote."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.data.index_header import read_header, smallest_dtype
from megatron_patch.data.indexed import IndexedDataset, IndexedDatasetBuilder

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "index.json").read_text())["indexed"]
EVERY = pytest.mark.parametrize("name", GOLDEN)


def write(prefix, documents, dtype):
    """One `add` per document; each document is a list of sequences."""
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for document in documents:
            builder.add(list(chain.from_iterable(document)), [len(s) for s in document], [len(document)])
    return str(prefix)


def place(prefix, name):
    """The golden bytes as a pair."""
    for suffix in ("bin", "idx"):
        Path(f"{prefix}.{suffix}").write_bytes(bytes.fromhex(GOLDEN[name][f"{suffix}_hex"]))
    return str(prefix)


@pytest.mark.parametrize("name", [name for name in GOLDEN if "multimodal" not in name])
def test_written_bytes_are_megatrons(name, tmp_path):
    prefix = write(tmp_path / "x", GOLDEN[name]["documents"], GOLDEN[name]["dtype"])
    assert Path(f"{prefix}.bin").read_bytes().hex() == GOLDEN[name]["bin_hex"]
    assert Path(f"{prefix}.idx").read_bytes().hex() == GOLDEN[name]["idx_hex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@EVERY
def test_megatrons_bytes_are_read(name, tmp_path):
    documents = GOLDEN[name]["documents"]
    dataset = IndexedDataset(place(tmp_path / "x", name))
    assert [dataset[i].tolist() for i in range(len(dataset))] == list(chain.from_iterable(documents))
    assert dataset.document_indices.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    assert all(dataset[i].dtype == GOLDEN[name]["dtype"] for i in range(len(dataset)))


@EVERY
def test_a_header_counts_without_reading_tokens(name, tmp_path):
    documents = GOLDEN[name]["documents"]
    header = read_header(place(tmp_path / "x", name))
    sequences = list(chain.from_iterable(documents))
    assert (header.documents, header.sequences) == (len(documents), len(sequences))
    assert (header.tokens, header.dtype) == (sum(map(len, sequences)), GOLDEN[name]["dtype"])


def test_many_documents_at_once_are_the_same_file_as_one_by_one(tmp_path):
    documents = [[[1, 2, 3]], [], [[4]], [[5, 6]]]
    one_by_one = write(tmp_path / "a", documents, "uint16")
    with IndexedDatasetBuilder(tmp_path / "b", "uint16") as builder:
        builder.add(np.arange(1, 7), [3, 1, 2], [1, 0, 1, 1])
    for suffix in (".bin", ".idx"):
        assert Path(one_by_one + suffix).read_bytes() == Path(f"{tmp_path}/b{suffix}").read_bytes()


def test_a_part_of_a_sequence_is_taken_without_copying(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "x", [[[1, 2, 3]], [[4, 5, 6, 7]]], "uint16"))
    part = dataset.get(1, 1, 2)
    assert part.tolist() == [5, 6] and dataset.get(1, 2).tolist() == [6, 7]
    assert np.shares_memory(part, dataset.get(1))


def test_tokens_outlive_their_dataset(tmp_path):
    tokens = IndexedDataset(write(tmp_path / "x", [[[7, 8, 9]]], "int32"))[0]
    assert tokens.tolist() == [7, 8, 9]


@pytest.mark.parametrize(("dtype", "token"), [("uint16", 65536), ("uint16", -100), ("int8", 128)])
def test_a_token_that_does_not_fit_is_refused(dtype, token, tmp_path):
    with pytest.raises(ValueError, match=f"token {token} does not fit {dtype}"):
        write(tmp_path / "x", [[[1, token]]], dtype)
    assert not list(tmp_path.iterdir())


def test_a_failed_writer_leaves_the_earlier_pair_alone(tmp_path):
    prefix = write(tmp_path / "x", [[[1]]], "uint16")
    with pytest.raises(KeyboardInterrupt), IndexedDatasetBuilder(prefix, "uint16") as builder:
        builder.add([2], [1], [1])
        raise KeyboardInterrupt
    assert IndexedDataset(prefix)[0].tolist() == [1]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interruption_between_the_two_files_leaves_no_mixed_pair(tmp_path, monkeypatch):
    prefix = write(tmp_path / "x", [[[1]]], "uint16")
    rename = Path.replace

    def interrupted(path, target):
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(prefix, [[[2]]], "uint16")
    with pytest.raises(FileNotFoundError, match=r"x\.idx does not exist"):
        read_header(prefix)
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_counts_that_do_not_add_up_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="3 tokens in sequences of 2"),
        IndexedDatasetBuilder(tmp_path / "x", "int32") as b,
    ):
        b.add([1, 2, 3], [2], [1])


@pytest.mark.parametrize(("size", "dtype"), [(65499, "uint16"), (65500, "int32")])
def test_the_token_type_follows_the_vocabulary(size, dtype):
    assert smallest_dtype(size) == dtype


def damaged(tmp_path, suffix, change):
    prefix = place(tmp_path / "x", "uint16_three_docs_one_empty")
    path = Path(prefix + suffix)
    path.write_bytes(change(path.read_bytes()))
    return prefix


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".idx", lambda b: b"PK" + b[2:], "is not a Megatron index"),
        (".idx", lambda b: b"", "is not a Megatron index"),
        (".idx", lambda b: b[:30], "is truncated: 30 bytes"),
        (".idx", lambda b: b[:9] + b"\x02" + b[10:], "has version 2; version 1 is read"),
        (".idx", lambda b: b[:17] + b"\x63" + b[18:], "has token type 99"),
        (".idx", lambda b: b[:17] + b"\x07" + b[18:], "has token type float32; tokens are whole numbers"),
        (".idx", lambda b: b[:-1], "is truncated: 101 bytes, its header describes 102"),
        (".idx", lambda b: b + b"xx", "is too long: 104 bytes"),
        (".idx", lambda b: b[:-8] + b"\x02" + b[-7:], "cover 2 sequences of 3"),
        (".bin", lambda b: b[:-2], "has 12 bytes, but .*x.idx describes 14"),
        (".bin", lambda b: b + b"\x00", "has 15 bytes"),
    ],
)
def test_a_damaged_pair_is_named(suffix, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_header(damaged(tmp_path, suffix, change))


def test_an_index_that_points_outside_is_named(tmp_path):
    prefix = damaged(tmp_path, ".idx", lambda b: b[:34] + b"\x20" + b[35:])  # first length 32, last one intact
    with pytest.raises(ValueError, match="sequence 0 lies outside"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("given", "hint"), [("x_text", "did you mean .*x_text_document"), ("x_text_document.bin", "without its suffix")]
)
def test_a_missing_pair_is_named_with_its_likely_spelling(given, hint, tmp_path):
    place(tmp_path / "x_text_document", "int32_labels")
    with pytest.raises(FileNotFoundError, match=f"idx does not exist; .*{hint}"):
        read_header(tmp_path / given)


def test_a_missing_bin_is_named(tmp_path):
    prefix = place(tmp_path / "x", "int32_labels")
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.bin does not exist$"):
        IndexedDataset(prefix)


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path):
    program = (
        "import os, signal, sys\nfrom megatron_patch.data.indexed import IndexedDatasetBuilder\n"
        "builder = IndexedDatasetBuilder(sys.argv[1], 'uint16')\nbuilder.add([1], [1], [1])\nbuilder.complete({})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a[1]")])
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 3
    kept = {f"a[1].bin.{os.getppid()}.tmp", "a[1].bin.x.tmp", "a[1]2.idx.99999999.tmp"}
    for name in kept:
        (tmp_path / name).touch()
    with IndexedDatasetBuilder(tmp_path / "a[1]", "uint16") as builder:
        assert {path.name for path in tmp_path.iterdir()} == {*kept, f"a[1].bin.{os.getpid()}.tmp"}
        builder.add([1], [1], [1])
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "a[1].bin", "a[1].idx"}
