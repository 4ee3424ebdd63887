"""Datasets as a command names them: Megatron's options, and what is wrong with them, said before a run starts."""

import json
import shlex
import struct

import pytest
from commands import PRETRAINING, RAW_FINE_TUNING, changed
from test_planning import flags

from megatron_patch.data import preprocess_sft
from megatron_patch.data.index_header import CODES, MAGIC


def write_pair(prefix, lengths):
    """A pair of uint16 documents, without numpy."""
    offsets, at = [], 0
    for length in lengths:
        offsets.append(at)
        at += 2 * length
    count = len(lengths)
    head = MAGIC + struct.pack("<QBQQ", 1, CODES["uint16"], count, count + 1)
    arrays = struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *offsets, *range(count + 1))
    prefix.with_suffix(".idx").write_bytes(head + arrays)
    prefix.with_suffix(".bin").write_bytes(bytes(at))


@pytest.fixture
def command(tmp_path):
    """A pre-training command in a directory that holds the datasets a, b, `one` of one document, and `empty`."""
    for name, lengths in {"a": [9] * 100, "b": [9] * 100, "one": [9], "empty": []}.items():
        write_pair(tmp_path / name, lengths)
    return changed(PRETRAINING, DATASET_PATH="a", VALID_DATASET_PATH="a")


@pytest.mark.parametrize(
    ("options", "train", "valid"),
    [
        ("--data-path 0.3 a 0.7 b", "0.3 a 0.7 b", "0.3 a 0.7 b"),
        ("--data-path=b", "b", "b"),
        ("--train-data-path a b --valid-data-path b", "a b", "b"),
        ("--valid-data-path b", "a", "b"),
        ("--data-args-path words", "0.3 a 0.7 b", "0.3 a 0.7 b"),
        ("--per-split-data-args-path splits.json --seed 7", "0.3 a 0.7 b", "b"),
        ("--train-data-path words --valid-data-path splits.json", "0.3 a 0.7 b", "b"),
    ],
)
def test_every_option_that_names_datasets_reaches_the_run(options, train, valid, planned, command, tmp_path):
    (tmp_path / "words").write_text("0.3 a # the first\n0.7 b\n")
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["0.3", "a", "0.7", "b"], "valid": ["b"]}))
    run = flags(planned("mistral", [*command, *shlex.split(options)]))
    assert (" ".join(run.data.train_data_path), " ".join(run.data.valid_data_path)) == (train, valid)
    assert run.data.seed == (7 if "--seed" in options else 1234)


def test_raw_records_are_a_file_a_directory_or_a_pattern(planned, refused, monkeypatch, tmp_path):
    monkeypatch.setenv("MP_DATASET_TYPE", "raw")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.jsonl").write_text("")
    (tmp_path / "in/2.jsonl.gz").write_text("")
    for name in ("in", "in/*.jsonl*", "in/1.jsonl"):
        plan = planned("mistral", changed(RAW_FINE_TUNING, DATASET_PATH=name, VALID_DATASET_PATH="in"))
        assert flags(plan).data.train_data_path == (name,)
        assert not any("input" in warning for warning in plan["warnings"])
    (warning,) = planned("mistral", changed(RAW_FINE_TUNING, DATASET_PATH="no*", VALID_DATASET_PATH="in"))["warnings"][
        1:2
    ]
    assert "input 'no*' is no file, no directory and no pattern" in warning


def test_a_test_dataset_is_said_to_have_no_effect(planned, command):
    warnings = planned("mistral", [*command, "--test-data-path", "b"])["warnings"]
    assert any("--test-data-path b has no effect" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data-path a --train-data-path b", "--data-path and --train-data-path name the same datasets"),
        ("--data-args-path absent", "--data-args-path 'absent' is not the name of one file that exists"),
        ("--train-data-path --seed 7", "--train-data-path is followed by nothing"),
        ("--data-path a --data-path b", "--data-path is given twice"),
        ("--per-split-data-args-path no.json", "'train' must be a list of prefixes"),
        ("--data-path 1 a b", "'1' stands where a prefix is expected"),
        ("--data-path 1 a b 2", "'b' stands where a weight is expected"),
        ("--data-path 1 a x b", "'x' stands where a weight is expected"),
        ("--data-path -1 a 2 b", "dataset weight -1 of '-1 a 2 b': weights are positive numbers"),
        ("--data-path 0 a 2 b", "dataset weight 0"),
        ("--data-path nan a 2 b", "dataset weight nan"),
        ("--split=-1,2", "split '-1,2': one to three non-negative numbers"),
        ("--split a,b", "split 'a,b' is not a list of numbers"),
        ("--valid-data-path b --split x", "split 'x' is not a list of numbers"),
        ("--split 0,0,0", "one to three non-negative numbers, not all zero"),
        ("--split 100,0,0", "split '100,0,0' leaves nothing of dataset 'a' (100 documents) for valid"),
        ("--data-path one", "leaves nothing of dataset 'one' (1 documents) for"),
        ("--train-data-path empty", "dataset 'empty' holds no token"),
        ("--valid-data-path empty", "dataset 'empty' holds no token"),
        ("--valid-data-path absent", "dataset 'absent': absent.idx does not exist"),
        ("--train-data-path cut", "cut.bin has 17 bytes, but cut.idx describes 18"),
    ],
)
def test_what_is_wrong_with_datasets_is_said_before_the_run(options, message, refused, command, tmp_path):
    (tmp_path / "no.json").write_text("{}")
    write_pair(tmp_path / "cut", [9])
    (tmp_path / "cut.bin").write_bytes(bytes(17))
    assert message in refused("mistral", [*command, *shlex.split(options)])


def test_a_dataset_of_another_kind_is_said_before_the_run(refused, command, tmp_path):
    head = {"format_version": 1, "tokenizer": {"name": "", "sha256": "", "vocabulary": 0}}
    (tmp_path / "a.json").write_text(json.dumps(head | {"kind": "fine-tuning", "seq_length": 64}))
    assert "a holds fine-tuning samples, not documents for pre-training" in refused("mistral", command)
    assert "a was made with SEQ_LEN 64, and this run has SEQ_LEN 128" in refused(
        "mistral", changed(command, SFT="true")
    )


def test_fine_tuning_preprocessing_takes_directories_and_patterns(planned, refused, tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("in/1.jsonl", "in/deep/2.csv.gz", "t"):
        (tmp_path / name).touch()
    rest = ["MistralTokenizer", "64", "out/data", ".", "true"]
    for words in (["in"], ["in/*.jsonl"], ["in/deep"], ["in/1.jsonl"]):
        plan = planned("sft-dataset", [*words, *rest, "--map-keys", '{"prompt": "q"}', "--skip-bad-lines"])
        assert plan["warnings"] == []
        options = preprocess_sft._parser().parse_args(plan["command"][3:])
        assert (options.input, options.map_keys, options.skip_bad_lines) == (words, '{"prompt": "q"}', True)
    assert "holds 1 JSON and 1 CSV files" in refused("sft-dataset", ["in", *rest, "--recursive"])
