"""Indices kept on disk: found again by content, built once, whole or not there."""

import multiprocessing
import shutil
import time

import numpy as np
import pytest

from megatron_patch.data.gpt import GPTDataset
from megatron_patch.data.index_cache import KEY, cached
from megatron_patch.data.indexed import IndexedDataset, IndexedDatasetBuilder

ORDER = {"num_samples": 20, "seq_length": 3, "seed": 1}


def write(prefix, lengths, first=0):
    with IndexedDatasetBuilder(prefix, "int32") as builder:
        builder.add(np.arange(first, first + sum(lengths)), lengths, [1] * len(lengths))


def open_dataset(prefix, cache, **changed):
    indexed = IndexedDataset(prefix)
    options = ORDER | changed
    return GPTDataset(indexed, (0, len(indexed)), options.pop("num_samples"), **options, cache_path=str(cache))


@pytest.fixture
def refuse_to_build(monkeypatch):
    def refuse():
        monkeypatch.setattr("megatron_patch.data.gpt.build_indices", lambda *_, **__: pytest.fail("built again"))

    return refuse


def test_what_was_built_is_found_again_after_a_move(tmp_path, refuse_to_build):
    write(tmp_path / "x", [5, 5, 5, 5])
    built = open_dataset(tmp_path / "x", tmp_path / "cache").indices
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"x{suffix}", tmp_path / f"moved{suffix}")
    refuse_to_build()
    for ours, found in zip(built, open_dataset(tmp_path / "moved", tmp_path / "cache").indices, strict=True):
        assert ours.tolist() == found.tolist() and ours.dtype == found.dtype


def test_other_content_or_another_order_is_not_mistaken_for_it(tmp_path, refuse_to_build):
    write(tmp_path / "x", [5, 5, 5, 5])
    open_dataset(tmp_path / "x", tmp_path / "cache")
    refuse_to_build()
    for name in ORDER:
        with pytest.raises(pytest.fail.Exception, match="built again"):
            open_dataset(tmp_path / "x", tmp_path / "cache", **{name: ORDER[name] + 1})
    write(tmp_path / "x", [5, 5, 6, 4])  # as many bytes, under the same name
    with pytest.raises(pytest.fail.Exception, match="built again"):
        open_dataset(tmp_path / "x", tmp_path / "cache")


@pytest.mark.parametrize("name", ["1.npy", KEY])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_damaged_folder_is_built_again(name, damage, tmp_path):
    write(tmp_path / "x", [5, 5, 5, 5])
    first = open_dataset(tmp_path / "x", tmp_path / "cache").indices.samples.tolist()
    damage(next(tmp_path.glob(f"cache/*/{name}")))
    assert open_dataset(tmp_path / "x", tmp_path / "cache").indices.samples.tolist() == first
    assert all(path.stat().st_size for path in tmp_path.glob("cache/*/*"))


def test_a_failing_build_leaves_nothing(tmp_path):
    def fail():
        raise MemoryError("not enough")

    with pytest.raises(MemoryError):
        cached(str(tmp_path), {"a": 1}, fail)
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        cached(str(tmp_path), {"a": 1}, lambda: (np.arange(3), np.array([object()])))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_directory_that_cannot_be_written_is_read_or_done_without(tmp_path, caplog):
    kept, empty = tmp_path / "kept", tmp_path / "file" / "empty"
    write(tmp_path / "x", [5, 5, 5, 5])
    built = open_dataset(tmp_path / "x", kept).indices.samples.tolist()
    for path in kept.glob("*.lock"):
        path.unlink()
    kept.chmod(0o555)
    assert open_dataset(tmp_path / "x", kept).indices.samples.tolist() == built
    assert not list(kept.glob("*.lock")) and not caplog.records
    (tmp_path / "file").touch()
    assert open_dataset(tmp_path / "x", empty).indices.samples.tolist() == built
    assert "cannot be written (Not a directory): every rank builds its own" in caplog.text


@pytest.mark.parametrize("text", ["{}", "[]", "null", "", '{"arrays": "x"}'])
def test_a_damaged_key_is_written_again(text, tmp_path):
    write(tmp_path / "x", [5, 5, 5, 5])
    wanted = open_dataset(tmp_path / "x", tmp_path / "cache").indices.samples.tolist()
    (key,) = (tmp_path / "cache").glob("*/key.json")
    whole = key.read_text()
    key.write_text(text)
    assert open_dataset(tmp_path / "x", tmp_path / "cache").indices.samples.tolist() == wanted
    assert key.read_text() == whole


def test_a_full_disk_is_told_with_its_directory_and_leaves_no_index(tmp_path, monkeypatch):
    def save(*_, **__):
        raise OSError("59400 requested and 218 written")

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OSError, match=f"no index can be written in {tmp_path} .59400 requested and 218 written"):
        cached(str(tmp_path), {"a": 1}, lambda: (np.arange(7),))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_node_whose_lock_is_its_own_leaves_what_another_wrote(tmp_path):
    key, arrays = {"a": 1}, (np.arange(7),)

    def build_behind_another():
        other = cached(str(tmp_path / "other"), key, lambda: arrays)
        shutil.copytree(tmp_path / "other", tmp_path / "cache", dirs_exist_ok=True)
        (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir() and (path / KEY).exists())
        there.append((folder, folder.stat().st_ino))
        return other

    there = []
    (found,) = cached(str(tmp_path / "cache"), key, build_behind_another)
    ((folder, number),) = there
    assert found.tolist() == arrays[0].tolist() and folder.stat().st_ino == number


def build_slowly(directory, marks):
    def build():
        (marks / str(time.monotonic_ns())).touch()
        time.sleep(0.3)
        return (np.arange(7),)

    (found,) = cached(str(directory), {"a": 1}, build)
    assert found.tolist() == list(range(7))


def test_ranks_of_a_node_build_once(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=build_slowly, args=(tmp_path / "cache", marks)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert len(list(marks.iterdir())) == 1


def test_arrays_stay_when_their_files_go(tmp_path):
    write(tmp_path / "x", [5, 5, 5, 5])
    samples = open_dataset(tmp_path / "x", tmp_path / "cache").indices.samples
    wanted = samples.tolist()
    shutil.rmtree(tmp_path / "cache")
    assert samples.tolist() == wanted
