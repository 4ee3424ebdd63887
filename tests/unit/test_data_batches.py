"""What training consumes: who gets which samples, and when data is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_patch.config.data import DataConfig
from megatron_patch.data.batches import training_batches, validation_batches
from megatron_patch.data.gpt import GPTDataset
from megatron_patch.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megatron_patch.data.tokenizer import load_tokenizer

SIZES = {"family_prompt": "mistral", "global_batch_size": 8, "micro_batch_size": 2}
ALONE = {"rank": 0, "size": 1}


@pytest.fixture
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


@pytest.fixture
def config(tmp_path):
    """Twenty documents of ten distinct tokens for training, four for validation; seq_length 6."""
    for name, first, count in (("train", 0, 20), ("valid", 200, 4)):
        with IndexedDatasetBuilder(tmp_path / name, "uint16") as builder:
            builder.add(np.arange(first, first + 10 * count), [10] * count, [1] * count)
    return DataConfig(
        train_data_path=(str(tmp_path / "train"),),
        valid_data_path=(str(tmp_path / "valid"),),
        seq_length=6,
        max_padding_length=48,
    )


@pytest.fixture
def raw(config, tmp_path):
    """Ten records whose answers are their numbers, for training; three others for validation."""
    for name, numbers in (("train", range(10)), ("valid", range(20, 23))):
        records = [{"instruction": "n", "output": f"n{number}"} for number in numbers]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    paths = {f"{name}_data_path": (str(tmp_path / f"{name}.json"),) for name in ("train", "valid")}
    return replace(config, dataset="JSON-SFT", **paths)


def rows(steps):
    """Tokens of every sample, step by step, micro-batches joined."""
    return [torch.cat([batch.tokens for batch in step]).tolist() for step in steps]


def answers(steps, tokenizer):
    """The number in the answer of every sample, step by step."""
    return [
        [
            int(tokenizer.decode(labels[mask > 0], skip_special_tokens=True).strip()[1:])
            for batch in step
            for labels, mask in zip(batch.labels, batch.loss_mask, strict=True)
        ]
        for step in steps
    ]


def test_one_rank_reads_samples_in_order(config, tokenizer):
    steps = list(training_batches(config, tokenizer, train_iters=5, **SIZES, **ALONE))
    dataset = GPTDataset(IndexedDataset(config.train_data_path[0]), (0, 20), 40, seq_length=6, seed=1234)
    assert rows(steps) == [[dataset[8 * step + k].tokens.tolist() for k in range(8)] for step in range(5)]
    batch = steps[0][0]
    assert (len(steps[0]), batch.tokens.shape) == (4, (2, 6))
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert torch.equal(batch.loss_mask, torch.ones(2, 6)) and batch.loss_mask.dtype == torch.float32
    assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])


@pytest.mark.parametrize("kind", ["config", "raw"])
def test_ranks_are_dealt_slices_of_each_block(kind, request, tokenizer):
    config = request.getfixturevalue(kind)
    whole = rows(training_batches(config, tokenizer, train_iters=3, **SIZES, **ALONE))
    dealt = [rows(training_batches(config, tokenizer, train_iters=3, **SIZES, rank=r, size=2)) for r in range(2)]
    for step, all_rows in enumerate(whole):
        assert dealt[0][step] == all_rows[0:2] + all_rows[4:6]
        assert dealt[1][step] == all_rows[2:4] + all_rows[6:8]


@pytest.mark.parametrize("kind", ["config", "raw"])
def test_continuing_reads_what_an_uninterrupted_run_would(kind, request, tokenizer):
    config = request.getfixturevalue(kind)
    whole = rows(training_batches(config, tokenizer, train_iters=5, **SIZES, **ALONE))
    rest = rows(training_batches(config, tokenizer, train_iters=5, start_iteration=3, **SIZES, **ALONE))
    assert rest == whole[3:]


@pytest.mark.parametrize("kind", ["config", "raw"])
@pytest.mark.parametrize("loader", ["single", "cyclic"])
def test_a_run_continues_exactly_on_every_other_data_parallel_size(kind, loader, request, tokenizer):
    """Step by step, the ranks of every size together read what one rank does: any of them can go on for another."""
    config = replace(request.getfixturevalue(kind), dataloader_type=loader)
    whole = rows(training_batches(config, tokenizer, train_iters=7, **SIZES, **ALONE))
    for start, micro, size in [(0, 1, 8), (1, 1, 2), (3, 2, 4), (4, 4, 2), (6, 8, 1)]:
        sizes = SIZES | {"micro_batch_size": micro, "size": size, "start_iteration": start}
        ranks = [list(training_batches(config, tokenizer, train_iters=7, **sizes, rank=r)) for r in range(size)]
        for step, wanted in enumerate(whole[start:]):
            micros = zip(*(ranks[r][step] for r in range(size)), strict=True)
            assert [row for turn in micros for batch in turn for row in batch.tokens.tolist()] == wanted


def test_cyclic_reads_every_sample_once_a_pass_and_not_in_order(config, tokenizer):
    cyclic = replace(config, dataloader_type="cyclic")
    (read,) = rows(training_batches(cyclic, tokenizer, train_iters=1, **SIZES | {"global_batch_size": 32}, **ALONE))
    dataset = GPTDataset(IndexedDataset(config.train_data_path[0]), (0, 20), 32, seq_length=6, seed=1234)
    stored = [dataset[number].tokens.tolist() for number in range(len(dataset))]
    assert len(dataset) == 33 and read != stored[:32]
    assert len({tuple(row) for row in read}) == 32 and all(row in stored for row in read)


@pytest.mark.parametrize("name", ["reset_attention_mask", "reset_position_ids"])
def test_documents_can_be_kept_apart(name, config, tokenizer, tmp_path):
    end = tokenizer.eos_token_id
    with IndexedDatasetBuilder(tmp_path / "train", "uint16") as builder:
        for _ in range(9):
            builder.add([7, 8, 9, end], [4], [1])
    ((batch, *_),) = training_batches(replace(config, **{name: True}), tokenizer, train_iters=1, **SIZES, **ALONE)
    for tokens, starts in zip(batch.tokens.tolist(), batch.starts.tolist(), strict=True):
        begins = [0] + [place + 1 for place in range(5) if tokens[place] == end]
        assert starts == [max(begin for begin in begins if begin <= place) for place in range(6)]
    assert batch.loss_mask.all()


def test_what_follows_an_end_can_be_left_out_of_the_loss(config, tokenizer, tmp_path):
    end = tokenizer.eos_token_id
    with IndexedDatasetBuilder(tmp_path / "train", "uint16") as builder:
        builder.add([7, 8, end] * 20, [3] * 20, [1] * 20)
    ((batch, *_),) = training_batches(replace(config, eod_mask_loss=True), tokenizer, train_iters=1, **SIZES, **ALONE)
    assert batch.starts is None
    assert torch.equal(batch.loss_mask == 0, batch.tokens == end) and (batch.loss_mask == 0).any()


def test_a_tokenizer_without_an_end_cannot_tell_documents_apart(config, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no end-of-text token"):
        training_batches(replace(config, eod_mask_loss=True), tokenizer, train_iters=1, **SIZES, **ALONE)


def test_validation_is_the_same_every_time(config, tokenizer):
    batches = validation_batches(config, tokenizer, eval_iters=2, **SIZES, **ALONE)
    first, again = rows(batches), rows(batches)
    assert first == again and len(first) == len(batches) == 2
    assert min(min(row) for step in first for row in step) >= 200


def test_one_path_for_both_is_split(config, tokenizer):
    shared = replace(config, valid_data_path=config.train_data_path, split="80,20,0")
    seen = {
        "train": rows(training_batches(shared, tokenizer, train_iters=9, **SIZES, **ALONE)),
        "valid": rows(validation_batches(shared, tokenizer, eval_iters=9, **SIZES, **ALONE)),
    }
    tokens = {name: {token for step in steps for row in step for token in row} for name, steps in seen.items()}
    assert max(tokens["train"]) < 160 <= min(tokens["valid"])


def test_a_blend_may_be_asked_for(config, tokenizer):
    mixed = replace(config, train_data_path=("0.75", config.train_data_path[0], "0.25", config.valid_data_path[0]))
    (step,) = rows(training_batches(mixed, tokenizer, train_iters=1, **SIZES, **ALONE))
    assert sum(row[0] >= 200 for row in step) == 2


def test_records_are_shuffled_anew_each_epoch_and_each_comes_once(raw, tokenizer):
    steps = answers(training_batches(raw, tokenizer, train_iters=5, **SIZES, **ALONE), tokenizer)
    stream = [number for step in steps for number in step]
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = answers(training_batches(replace(raw, seed=1), tokenizer, train_iters=5, **SIZES, **ALONE), tokenizer)
    assert other != steps


def test_validation_records_come_in_file_order_and_repeat(raw, tokenizer):
    (step,) = answers(validation_batches(raw, tokenizer, eval_iters=1, **SIZES, **ALONE), tokenizer)
    assert step == [20, 21, 22, 20, 21, 22, 20, 21]


@pytest.mark.parametrize("word", ["{}", "{}/*.jsonl"])
def test_records_come_from_every_file_of_a_directory_in_natural_order_under_keys_of_any_name(
    word, raw, tokenizer, tmp_path
):
    (tmp_path / "in").mkdir()
    for number in (10, 9, 2):
        (tmp_path / f"in/{number}.jsonl").write_text(json.dumps({"q": "n", "output": "no", "a": f"n{number}"}) + "\n")
    raw = replace(raw, valid_data_path=(word.format(tmp_path / "in"),), map_keys='{"prompt": "q", "response": "a"}')
    (step,) = answers(validation_batches(raw, tokenizer, eval_iters=1, **SIZES, **ALONE), tokenizer)
    assert step == [2, 9, 10, 2, 9, 10, 2, 9]


def test_left_out_records_are_said_once_for_data_that_is_divided(raw, tokenizer, tmp_path, caplog):
    with (tmp_path / "train.json").open("w") as file:
        file.write('{"instruction": "n", "output": "n1"}\n' + json.dumps({"instruction": "n" * 400, "output": "n2"}))
    raw = replace(raw, valid_data_path=raw.train_data_path, split="50,50,0")
    with (tmp_path / "train.json").open("a") as file:
        file.write('\n{"instruction": "n", "output": "n3"}')
    for rank in range(2):
        training_batches(raw, tokenizer, train_iters=1, **SIZES, rank=rank, size=2, is_loud=rank == 0)
        validation_batches(raw, tokenizer, eval_iters=1, **SIZES, rank=rank, size=2, is_loud=rank == 0)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/train.json: 1 of 3 records left out, their prompts alone are longer than 48 tokens"
    ]


@pytest.mark.parametrize(
    ("changed", "sizes", "message"),
    [
        ({}, {"size": 3}, "global_batch_size 8 is not a multiple of micro_batch_size 2 × data-parallel size 3"),
        ({"train_data_path": ("absent",)}, {}, r"absent\.idx does not exist"),
        ({"dataset": "JSON-SFT", "train_data_path": ("a", "b")}, {}, "input 'a' is no file"),
        ({"dataset": "JSON-SFT", "prompt_type": "none"}, {}, "prompt type 'none' is not one of"),
    ],
)
def test_unusable_data_is_refused_before_the_first_batch(changed, sizes, message, config, tokenizer):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        training_batches(replace(config, **changed), tokenizer, train_iters=1, **SIZES, **(ALONE | sizes))


def test_an_empty_split_is_refused(config, tokenizer):
    shared = replace(config, valid_data_path=config.train_data_path)
    with pytest.raises(ValueError, match=r"split '99,1,0' leaves nothing of .* \(20 documents or records\) for valid"):
        validation_batches(shared, tokenizer, eval_iters=1, **SIZES, **ALONE)


@pytest.mark.parametrize("token", [600, -100], ids=["beyond the vocabulary", "a fine-tuning label"])
def test_data_of_another_tokenizer_is_refused(config, tokenizer, tmp_path, token):
    with IndexedDatasetBuilder(tmp_path / "train", "int32") as builder:
        builder.add([1] * 30 + [token], [31], [1])
    with pytest.raises(ValueError, match=f"holds token {token}, but the tokenizer's ids are 0 to 599"):
        list(training_batches(config, tokenizer, train_iters=9, **SIZES, **ALONE))
