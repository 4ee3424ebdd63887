"""ModelLink's instruction data as training samples: its order, its split, its labels, and what packed rows see."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_patch.config.data import DataConfig
from megatron_patch.data.batches import training_batches, validation_batches
from megatron_patch.data.index_header import check_instruction_files, instruction_prefixes
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.data.instruction_index import InstructionFiles, shuffle_index
from megatron_patch.data.paths import split_words
from megatron_patch.data.splits import SPLITS, shifted_split_range
from megatron_patch.data.tokenizer import load_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/instruction_orders.json").read_text())
LENGTH = 8
SIZES = {"family_prompt": "mistral", "global_batch_size": 4, "micro_batch_size": 1}
ALONE = {"rank": 0, "size": 1}


@pytest.fixture
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


def write(prefix, samples, masks=None, dtype="int32"):
    """The three files of samples that are (prompt, answer) each."""
    ids = [[*prompt, *answer] for prompt, answer in samples]
    labels = [[-100] * len(prompt) + answer for prompt, answer in samples]
    masks = masks or [[1] * len(row) for row in ids]
    for name, rows in zip(instruction_prefixes(str(prefix)), (ids, masks, labels), strict=True):
        with IndexedDatasetBuilder(name, dtype) as builder:
            for row in rows:
                builder.add(row, [len(row)], [1])
    return str(prefix)


@pytest.fixture
def numbered(tmp_path):
    """Sample n is a prompt of n + 10 and an answer of n + 100 twice."""
    return write(tmp_path / "data", [([number + 10], [number + 100] * 2) for number in range(12)])


def config_of(prefix, **changes):
    config = DataConfig(
        train_data_path=(prefix,),
        valid_data_path=(prefix,),
        split="50,50,0",
        is_instruction_dataset=True,
        seq_length=LENGTH,
        max_padding_length=LENGTH,
        seed=1234,
    )
    return replace(config, **changes)


def samples_of(prefix, *, is_packed=False, eos=2, length=LENGTH, order=None):
    order = np.arange(check_instruction_files(prefix).sequences) if order is None else order
    return InstructionFiles(prefix, order, seq_length=length, pad=0, eos=eos, is_packed=is_packed)


def firsts(steps):
    return [int(tokens[0]) - 10 for step in steps for batch in step for tokens in batch.tokens]


def trained(config, tokenizer, train_iters, rank=0, size=1, **more):
    return training_batches(config, tokenizer, train_iters=train_iters, rank=rank, size=size, **SIZES, **more)


@pytest.mark.parametrize(("seed", "count", "wanted", "order"), GOLDEN["orders"])
def test_the_order_is_modellinks(seed, count, wanted, order):
    assert shuffle_index(0, count, wanted, seed).tolist() == order
    assert shuffle_index(7, 7 + count, wanted, seed).tolist() == [7 + number for number in order]


@pytest.mark.parametrize(("text", "count", "bounds"), GOLDEN["splits"])
def test_the_parts_are_modellinks(text, count, bounds):
    assert [shifted_split_range(text, name, count) for name in SPLITS] == list(pairwise(bounds))


def test_training_reads_each_pass_whole_in_that_order(numbered, tokenizer):
    config = config_of(numbered, valid_data_path=("elsewhere",))
    read = firsts(trained(config, tokenizer, 6))
    assert read == shuffle_index(0, 12, 24, 1234)[:24].tolist()
    assert sorted(read[:12]) == sorted(read[12:]) == list(range(12))


def test_validation_is_no_training_data(numbered, tokenizer):
    config = config_of(numbered)
    train = firsts(trained(config, tokenizer, 3))
    valid = firsts(validation_batches(config, tokenizer, eval_iters=3, **SIZES, **ALONE))
    assert (set(train), set(valid)) == (set(range(6)), set(range(6, 12)))


def test_ranks_share_the_samples_and_a_stopped_run_goes_on(numbered, tokenizer):
    config = config_of(numbered, valid_data_path=("elsewhere",))
    whole = firsts(trained(config, tokenizer, 4))
    assert firsts(trained(config, tokenizer, 4, start_iteration=2)) == whole[8:]
    ranks = [firsts(trained(config, tokenizer, 4, rank, 2)) for rank in range(2)]
    assert [number for pair in zip(*ranks, strict=True) for number in pair] == whole


def test_labels_are_shifted_and_what_is_cut_or_padded_is_not_learned(tmp_path):
    prefix = write(tmp_path / "data", [([5, 6], [7, 8]), ([5] * 6, [7] * 6), ([5], [])])
    short, long, bare = samples_of(prefix)
    assert short.tokens.tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert short.labels[short.loss_mask > 0].tolist() == [7, 8]
    assert short.loss_mask.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert long.tokens.tolist() == [5] * 6 + [7] * 2
    assert long.loss_mask.tolist() == [0] * 5 + [1] * 3
    assert (bare.tokens.tolist(), bare.loss_mask.sum()) == ([0] * LENGTH, 0)
    assert [sample.starts for sample in (short, long, bare)] == [None] * 3


def test_a_mask_that_counts_keeps_segments_apart(tmp_path):
    masks = [[1, 1, 2, 2, 2, 0], [1, 1]]
    prefix = write(tmp_path / "data", [([5] * 6, []), ([5], [7])], masks)
    for is_packed in (False, True):
        assert samples_of(prefix, is_packed=is_packed)[0].starts.tolist() == [0, 0, 2, 2, 2, 5, 5, 5]
    assert samples_of(prefix)[1].starts is None


def test_packed_rows_of_files_without_marks_are_cut_after_eos(tmp_path):
    prefix = write(tmp_path / "data", [([5, 6, 2, 5], [7, 2])])
    assert samples_of(prefix)[0].starts is None
    assert samples_of(prefix, is_packed=True)[0].starts.tolist() == [0, 0, 0, 3, 3, 3, 3, 3]
    with pytest.raises(ValueError, match="the tokenizer has no EOS to tell it"):
        samples_of(prefix, is_packed=True, eos=None)


def test_blends_and_one_pass_are_those_of_other_datasets(numbered, tmp_path, tokenizer):
    other = write(tmp_path / "other", [([number + 50], [1]) for number in range(4)])
    weighted = config_of(numbered, train_data_path=("3", numbered, "1", other), valid_data_path=("elsewhere",))
    read = firsts(trained(weighted, tokenizer, 5))
    assert sum(number >= 40 for number in read) == 5
    once = config_of(numbered, train_data_path=(numbered, other), valid_data_path=("elsewhere",))
    assert sorted(firsts(trained(once, tokenizer, 4))) == [*range(12), *range(40, 44)]


def test_samples_that_are_cut_are_counted(tmp_path, tokenizer, caplog):
    prefix = write(tmp_path / "data", [([5], [6]), ([5] * 2, [6] * 9), ([5] * 9, [6])])
    trained(config_of(prefix, valid_data_path=("elsewhere",)), tokenizer, 1)
    assert "2 of 3 samples for train are cut to 8 tokens, and 1 of these have nothing left" in caplog.text


def test_data_with_nothing_to_learn_is_refused(tmp_path, tokenizer):
    prefix = write(tmp_path / "data", [([5] * 9, [6])] * 3)
    with pytest.raises(ValueError, match="no sample has anything to learn in its first 8 tokens"):
        trained(config_of(prefix, valid_data_path=("elsewhere",)), tokenizer, 1)


def test_files_that_do_not_belong_together_are_refused(numbered, tmp_path):
    ids, _, labels = instruction_prefixes(numbered)
    with pytest.raises(FileNotFoundError, match=r"give its prefix without _packed_…: .*data$"):
        check_instruction_files(ids)
    with pytest.raises(FileNotFoundError, match=r"nothing_packed_input_ids_document\.idx does not exist"):
        check_instruction_files(str(tmp_path / "nothing"))
    other = write(tmp_path / "other", [([5, 5], [6]), ([5], [6])])
    for suffix in (".bin", ".idx"):
        Path(instruction_prefixes(other)[2] + suffix).replace(labels + suffix)
    with pytest.raises(ValueError, match=r"has 12 samples of 36 tokens, .*data_packed_labels_document 2 of 5"):
        check_instruction_files(numbered)
    same = write(tmp_path / "same", [([5], [6]), ([5, 5], [6])])
    again = write(tmp_path / "again", [([5, 5], [6]), ([5], [6])])
    for suffix in (".bin", ".idx"):
        Path(instruction_prefixes(same)[2] + suffix).replace(instruction_prefixes(again)[2] + suffix)
    with pytest.raises(ValueError, match=r"sample 0 of .* has another length in .*again_packed_labels"):
        samples_of(again)
    small = write(tmp_path / "small", [([], [5, 6])], dtype="uint16")
    with pytest.raises(ValueError, match="is of uint16, which cannot hold the label -100"):
        check_instruction_files(small)


def test_a_prefix_with_spaces_is_one_word(tmp_path):
    prefix = write(tmp_path / "two words", [([5], [6])])
    assert split_words(prefix) == (prefix,)


def test_batches_are_tensors_the_step_understands(numbered, tokenizer):
    batch = next(trained(config_of(numbered), tokenizer, 1))[0]
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert batch.labels.min() >= 0 and batch.starts is None
