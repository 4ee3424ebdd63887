"""The commands that show datasets and prepare their indices."""

import numpy as np
import pytest

from megatron_patch.config.data import DataConfig
from megatron_patch.data.__main__ import main
from megatron_patch.data.batches import training_batches
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.data.pretraining import open_indexed
from megatron_patch.data.sidecar import FINE_TUNING, describe
from megatron_patch.data.tokenizer import identity, load_tokenizer

RUN = ["--seq-length", "6", "--train-iters", "5", "--global-batch-size", "8"]


@pytest.fixture
def prefix(tmp_path):
    """Twenty documents of 0 to 9 tokens, of 0, 1 or 2 sequences, named by a prefix."""
    lengths = [number % 10 for number in range(20)]
    with IndexedDatasetBuilder(tmp_path / "x", "uint16") as builder:
        builder.add(np.arange(90), lengths, [0, 2] + [1] * 18)
    return str(tmp_path / "x")


def test_a_dataset_is_described_and_its_first_documents_shown(prefix, capsys):
    assert main(["inspect", prefix, "--documents", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{prefix}: 20 documents, 20 sequences, 90 tokens of uint16",
        "sequences: 2 empty, median 4, mean 4.5, longest 9 tokens",
        "                0           2 ██████████",
        "                1           2 ██████████",
        "              2–3           4 ████████████████████",
        "              4–7           8 ████████████████████████████████████████",
        "             8–15           4 ████████████████████",
        "document 0, 0 tokens: ",
        "document 1, 1 tokens: 0",
        "document 2, 2 tokens: 1 2",
    ]


def test_documents_are_decoded_and_long_ones_cut(tmp_path, tokenizer_directory, capsys):
    tokenizer = load_tokenizer(tokenizer_directory)
    ids = tokenizer("instruction " * 100, add_special_tokens=False)["input_ids"]
    with IndexedDatasetBuilder(tmp_path / "x", "uint16") as builder:
        builder.add(ids, [len(ids)], [1])
    assert main(["inspect", str(tmp_path / "x"), "--tokenizer-model", str(tokenizer_directory)]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown == f"document 0, {len(ids)} tokens: {tokenizer.decode(ids[:64])!r} …"


def test_fine_tuning_samples_and_instruction_data_are_decoded_and_labels_are_numbers(
    tmp_path, tokenizer_directory, capsys
):
    tokenizer = load_tokenizer(tokenizer_directory)
    first, second = ids = tokenizer("instruction instruction", add_special_tokens=False)["input_ids"][:2]
    description = describe(identity(tokenizer), "int32", {}, [], kind=FINE_TUNING, seq_length=3)
    with IndexedDatasetBuilder(tmp_path / "x", "int32") as builder:
        builder.add([first, -1 - second, 0, -100, second, -100], [6], [1])
        builder.finalize(description)
    columns = {"input_ids": ids, "attention_mask": [1, 1], "labels": [-100, second]}
    for field, values in columns.items():
        with IndexedDatasetBuilder(tmp_path / f"y_packed_{field}_document", "int32") as builder:
            builder.add(values, [2], [1])
    shown = []
    for name in ("x", "y", "y_packed_labels_document"):
        assert main(["inspect", str(tmp_path / name), "--tokenizer-model", str(tokenizer_directory)]) == 0
        shown.append(capsys.readouterr().out.splitlines()[-1])
    assert shown == [
        f"document 0, 3 tokens: {tokenizer.decode([*ids, 0])!r}",
        f"document 0, 2 tokens: {tokenizer.decode(ids)!r}",
        f"document 0, 2 tokens: -100 {second}",
    ]


def test_a_dataset_is_not_decoded_with_another_tokenizer(tmp_path, tokenizer_directory, capsys):
    with IndexedDatasetBuilder(tmp_path / "x", "uint16") as builder:
        builder.add([1], [1], [1])
        builder.finalize(describe({"name": "other", "sha256": "0", "vocabulary": 2}, "uint16", {}, []))
    assert main(["inspect", str(tmp_path / "x"), "--tokenizer-model", str(tokenizer_directory)]) == 1
    assert "was made with the tokenizer 'other' (2 ids)" in capsys.readouterr().err


@pytest.mark.parametrize("loader", ["single", "cyclic"])
def test_what_is_shown_of_an_iteration_is_what_training_reads(loader, prefix, tokenizer_directory, capsys):
    step = ["--iteration", "3", "--rank", "1", "--data-parallel-size", "2", "--micro-batch-size", "2"]
    assert (
        main(["inspect", prefix, "--documents", "0", *RUN, *step, "--split", "90,10", "--dataloader-type", loader]) == 0
    )
    shown = capsys.readouterr().out.split("iteration 3, data-parallel rank 1 of 2:\n")[1].splitlines()
    config = DataConfig(
        train_data_path=(prefix,),
        valid_data_path=(prefix,),
        split="90,10",
        seq_length=6,
        max_padding_length=6,
        dataloader_type=loader,
    )
    sizes = {"train_iters": 5, "global_batch_size": 8, "micro_batch_size": 2, "rank": 1, "size": 2}
    batches = training_batches(
        config, load_tokenizer(tokenizer_directory), family_prompt="mistral", start_iteration=2, **sizes
    )
    read = [row for batch in next(batches) for row in batch.tokens.tolist()]
    assert [line.split(": ")[1] for line in shown] == [" ".join(map(str, row)) for row in read]
    assert shown[2].startswith("micro-batch 1, row 0, sample ")


def test_indices_are_built_before_the_run(prefix, tmp_path, capsys, monkeypatch):
    cache = str(tmp_path / "cache")
    command = ["cache", f"0.5 '{prefix}' 0.5 '{prefix}'", *RUN, "--eval-iters", "1", "--split", "50,50"]
    assert main([*command, "--data-cache-path", cache]) == 0
    assert (
        capsys.readouterr().out
        == f"train: 40 samples of 6 tokens, in {cache}\nvalid: 8 samples of 6 tokens, in {cache}\n"
    )
    for module in ("gpt.build_indices", "blend.blend_indices"):
        monkeypatch.setattr(f"megatron_patch.data.{module}", lambda *_, **__: pytest.fail("built again"))
    words = ("0.5", prefix, "0.5", prefix)
    config = DataConfig(
        train_data_path=words,
        valid_data_path=words,
        split="50,50",
        seq_length=6,
        max_padding_length=6,
        data_cache_path=cache,
    )
    assert len(open_indexed(config, "train", 40, None)[0]) == 40
    assert len(open_indexed(config, "valid", 8, None)[0]) == 8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["cache", "1 other", *RUN, "--data-cache-path", "DIR"], "other.idx does not exist"),
        (["inspect", "absent"], "absent.idx does not exist"),
        (["inspect", "PREFIX", "--iteration", "1"], "--seq-length is None: give the run's own, 1 or more"),
        (["inspect", "PREFIX", *RUN, "--iteration", "6"], "--iteration 6 is beyond --train-iters 5"),
        (["inspect", "PREFIX", *RUN, "--iteration", "1", "--rank", "1"], "--rank 1 is not one of 0 to 0"),
        (["inspect", "PREFIX", *RUN, "--iteration", "1", "--split", "-1,2"], "split '-1,2': one to three non-negative"),
        (["cache", "PREFIX", *RUN], "say where the indices go: --data-cache-path DIR"),
        (["cache", "1 PREFIX other", *RUN, "--data-cache-path", "DIR"], "'1' stands where a prefix is expected"),
        (["inspect", "PREFIX", *RUN, "--iteration", "1", "--micro-batch-size", "0"], "--micro-batch-size is 0"),
        (["inspect", "PREFIX", *RUN, "--iteration", "1", "--data-parallel-size", "0"], "--data-parallel-size is 0"),
        (["cache", "PREFIX", *RUN, "--data-cache-path", "PREFIX.idx"], "x.idx"),
        (["cache", "1e308 PREFIX 1e308 PREFIX", *RUN, "--data-cache-path", "DIR"], "are too large to be added up"),
        (["cache", "1 PREFIX b PREFIX", *RUN, "--data-cache-path", "DIR"], "'b' stands where a weight is expected"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(arguments, sentence, prefix, tmp_path, capsys):
    words = {"PREFIX": prefix, "DIR": str(tmp_path / "cache")}
    for name, value in words.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    arguments = [f"--split={arguments.pop()}" if argument == "--split" else argument for argument in arguments]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("megatron_patch.data: ") and error.count("\n") == 1
