"""Several pairs as one."""

import json
from itertools import chain
from pathlib import Path

import pytest

from megatron_patch.data import indexed
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.data.merge import main
from megatron_patch.data.sidecar import describe, tokenizer_identity

DOCUMENTS = {"a2": [[[1, 2], [3]], [[4]]], "a10": [[], [[5, 6]]], "a1": [[[7]]]}


def write(prefix, documents, dtype="uint16", description=None):
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for document in documents:
            builder.add(list(chain.from_iterable(document)), [len(sequence) for sequence in document], [len(document)])
        builder.finalize(description)


def described(tokens, vocabulary, name="t", **more):
    counts = {"documents": 1, "tokens": tokens, "longest": tokens, "empty": 0}
    return describe(
        tokenizer_identity(name, vocabulary), "uint16", counts, [{"path": str(tokens)}], key="text", made=tokens, **more
    )


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_merged_datasets_are_what_one_run_would_have_written(at_once, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(indexed, "DOCUMENTS_AT_ONCE", at_once)
    for name, documents in DOCUMENTS.items():
        write(tmp_path / "in" / name, documents)
    write(tmp_path / "expected", DOCUMENTS["a1"] + DOCUMENTS["a2"] + DOCUMENTS["a10"])
    for _ in range(2):  # its own result is not merged into itself
        assert main(["--input", f"{tmp_path}/in", "--output-prefix", f"{tmp_path}/in/all"]) == 0
        for suffix in (".bin", ".idx"):
            assert Path(f"{tmp_path}/in/all{suffix}").read_bytes() == Path(f"{tmp_path}/expected{suffix}").read_bytes()
    assert "all: 5 documents, 7 tokens (uint16)" in capsys.readouterr().out
    assert not Path(f"{tmp_path}/in/all.json").exists()


def test_what_they_say_about_themselves_is_added_up(tmp_path):
    write(tmp_path / "in/a", [[[1, 2]]], description=described(2, {"x": 0}))
    write(tmp_path / "in/b", [[[1, 2, 3]]], description=described(3, {"x": 0}, "moved"))
    assert main(["--input", f"{tmp_path}/in", "--output-prefix", f"{tmp_path}/all"]) == 0
    assert json.loads((tmp_path / "all.json").read_text()) == {
        **{"format_version": 1, "tokenizer": tokenizer_identity("t", {"x": 0}), "dtype": "uint16"},
        **{"documents": 2, "tokens": 5, "empty": 0, "longest": 3, "key": "text"},
        "sources": [{"path": "2"}, {"path": "3"}],
    }


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"dtype": "int32"}, "have different token types"),
        ({"description": described(1, {"y": 0})}, "have different tokenizers"),
        ({"description": described(1, {"x": 0}, kind="fine-tuning", seq_length=8)}, "have different kinds of content"),
    ],
)
def test_datasets_that_differ_are_not_merged(second, told, tmp_path, capsys):
    write(tmp_path / "in/a", [[[1]]], description=described(1, {"x": 0}))
    write(tmp_path / "in/b", [[[1]]], **second)
    assert main(["--input", f"{tmp_path}/in", "--output-prefix", f"{tmp_path}/all"]) == 1
    assert f"in/a and {tmp_path}/in/b {told}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_samples_are_merged_with_samples_of_their_length(tmp_path, capsys):
    for name, length in (("a", 8), ("b", 8), ("c", 16)):
        told = described(1, {"x": 0}, kind="fine-tuning", seq_length=length, records=3)
        write(tmp_path / "in" / name, [[[1]]], description=told)
    arguments = ["--input", f"{tmp_path}/in", "--output-prefix", f"{tmp_path}/all"]
    assert main(arguments) == 1
    assert f"in/a and {tmp_path}/in/c have different kinds of content" in capsys.readouterr().err
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"in/c{suffix}").unlink()
    assert main(arguments) == 0
    told = json.loads((tmp_path / "all.json").read_text())
    assert (told["kind"], told["seq_length"], told["records"]) == ("fine-tuning", 8, 6)


@pytest.mark.parametrize("directory", ["absent", "."])
def test_a_directory_without_pairs_is_named(directory, tmp_path, capsys):
    assert main(["--input", f"{tmp_path}/{directory}", "--output-prefix", f"{tmp_path}/all"]) == 1
    assert "is no directory that holds .bin/.idx pairs" in capsys.readouterr().err


def test_merging_again_writes_the_same_and_overwrites_no_input(tmp_path, capsys):
    for name in ("a", "b"):
        write(tmp_path / name, [[[1]]])
    for _ in range(2):
        assert main(["--input", str(tmp_path), "--output-prefix", f"{tmp_path}/all"]) == 0
    (tmp_path / "all.idx").unlink()  # as an interruption may leave it
    assert main(["--input", str(tmp_path), "--output-prefix", f"{tmp_path}/all"]) == 0
    kept = (tmp_path / "a.bin").read_bytes()
    assert main(["--input", str(tmp_path), "--output-prefix", f"{tmp_path}/a"]) == 1
    assert "among what is to be merged, and would be lost" in capsys.readouterr().err
    assert (tmp_path / "a.bin").read_bytes() == kept


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_half_a_pair_is_not_passed_over(suffix, tmp_path, capsys):
    for name in ("a", "b"):
        write(tmp_path / "in" / name, [[[1]]])
    (tmp_path / f"in/b{suffix}").unlink()
    assert main(["--input", f"{tmp_path}/in", "--output-prefix", f"{tmp_path}/all"]) == 1
    assert f"in/b{suffix} does not exist" in capsys.readouterr().err
