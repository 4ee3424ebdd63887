"""What a dataset says about itself, and what a run makes of it."""

import hashlib
import json
from pathlib import Path

import pytest

from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.data.preprocess import Recipe, preprocess
from megatron_patch.data.sidecar import check_made_for, read_sidecar, tokenizer_identity
from megatron_patch.data.tokenizer import check_datasets, load_tokenizer


@pytest.fixture
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


@pytest.fixture
def prefix(tmp_path, tokenizer):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "hello world"}\n\n{"text": ""}\n')
    (report,) = preprocess([source], f"{tmp_path}/out", tokenizer, Recipe(append_eod=True)).reports
    return report.prefix


def test_a_dataset_says_what_made_it(prefix, tmp_path, tokenizer, tokenizer_directory):
    tokens = len(tokenizer("hello world", add_special_tokens=False).input_ids) + 1
    content = (tmp_path / "in.jsonl").read_bytes()
    told = read_sidecar(prefix)
    assert told.pop("tokenizer") == {
        "name": str(tokenizer_directory),
        "vocabulary": 600,
        "sha256": tokenizer_identity("", tokenizer.get_vocab())["sha256"],
    }
    assert told == {
        "format_version": 1,
        "dtype": "uint16",
        **{"documents": 2, "sequences": 1, "tokens": tokens, "longest": tokens, "empty": 1},
        **{"key": "text", "append_eod": True, "prepend_bos": False, "seq_length": None, "skipped": {"blank": 1}},
        **{"split_sentences": False, "keep_newlines": False},
        "sources": [
            {
                "path": f"{tmp_path}/in.jsonl",
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        ],
    }


def test_its_own_tokenizer_is_accepted_from_anywhere(prefix, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "moved")
    assert check_datasets([prefix, prefix], load_tokenizer(tmp_path / "moved")) == []


def test_another_tokenizer_is_refused_and_both_are_named(prefix, tokenizer, tmp_path, tokenizer_directory):
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    message = rf"made with the tokenizer '{tokenizer_directory}' \(600 ids\), .* has '{tmp_path}/other' \(601 ids\)"
    with pytest.raises(ValueError, match=message):
        check_datasets([prefix], load_tokenizer(tmp_path / "other"))


def test_the_same_size_is_not_the_same_vocabulary():
    one, other = tokenizer_identity("", {"a": 0, "b": 1}), tokenizer_identity("", {"b": 0, "a": 1})
    assert one["vocabulary"] == other["vocabulary"] == 2
    assert one["sha256"] != other["sha256"]
    assert one == tokenizer_identity("", {"b": 1, "a": 0})


def test_a_dataset_of_another_program_is_accepted_with_a_note(prefix, tokenizer):
    Path(f"{prefix}.json").unlink()
    (note,) = check_datasets([prefix], tokenizer)
    assert note == f"{prefix} has no out_text_document.json: which tokenizer made it cannot be verified"


def test_a_sidecar_of_other_files_is_named(prefix, tokenizer):
    told = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps(told | {"tokens": 99}))
    with pytest.raises(ValueError, match=r"says tokens 99, but the dataset has \d+; the files come from two"):
        check_datasets([prefix], tokenizer)


@pytest.mark.parametrize(
    ("told", "length", "message"),
    [
        ({"kind": "fine-tuning"}, None, "holds fine-tuning samples, not documents for pre-training; fine-tune on it"),
        ({"kind": "instructions"}, None, "holds instructions samples, not documents"),
        ({}, 8, "holds pre-training data, not fine-tuning samples; build it with"),
        ({"kind": "instructions"}, 8, "holds instructions data, not fine-tuning samples"),
        ({"kind": "fine-tuning", "seq_length": 16}, 8, "was made with SEQ_LEN 16, and this run has SEQ_LEN 8"),
    ],
)
def test_a_dataset_of_another_kind_or_length_is_named(told, length, message, prefix):
    content = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps(content | told))
    with pytest.raises(ValueError, match=f"out_text_document {message}"):
        check_made_for(prefix, length)


@pytest.mark.parametrize(
    ("told", "length"), [({}, None), ({"kind": "text"}, None), ({"kind": "fine-tuning", "seq_length": 8}, 8)]
)
def test_a_dataset_of_the_runs_kind_is_accepted_and_so_is_one_that_does_not_say(told, length, prefix):
    content = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps(content | told))
    check_made_for(prefix, length)
    Path(f"{prefix}.json").unlink()
    check_made_for(prefix, length)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "does not describe a dataset"),
        ("[]", "does not describe a dataset"),
        ('{"format_version": 1}', r"does not describe a dataset \('tokenizer'\)"),
        ('{"format_version": 2}', "has format version 2; version 1 is read here"),
    ],
)
def test_a_sidecar_that_cannot_be_understood_is_named(content, message, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=f"x.json {message}"):
        read_sidecar(tmp_path / "x")


def test_a_pair_written_over_another_does_not_keep_its_sidecar(prefix):
    with IndexedDatasetBuilder(prefix, "uint16") as builder:
        builder.add([1], [1], [1])
    assert read_sidecar(prefix) is None
