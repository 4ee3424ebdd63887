"""Packed records: every one once, the same rows everywhere, and the loss each has by itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.config.data import DataConfig
from megatron_patch.config.model import ModelConfig
from megatron_patch.data.batches import training_batches, validation_batches
from megatron_patch.data.chat_template import resolve_renderer
from megatron_patch.data.instructions import InstructionDataset, material_of
from megatron_patch.data.packing import PackedDataset, pack
from megatron_patch.data.tokenizer import load_tokenizer
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import single_process

LENGTH = 128
SIZES = {"family_prompt": "mistral", "global_batch_size": 4, "micro_batch_size": 2}
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=600,
    max_position_embeddings=LENGTH,
)


@pytest.fixture
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


@pytest.fixture
def config(tmp_path):
    """Thirty records of one to three turns, of very different lengths, some too long for a row."""
    random = np.random.default_rng(0)
    records = [
        {"messages": [message(f"q{n}"), message("yes " * int(random.integers(1, 9)), "assistant")] * int(turns)}
        for n, turns in enumerate(random.integers(1, 4, 30))
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    paths = (str(tmp_path / "records.json"),)
    return DataConfig(
        train_data_path=paths,
        valid_data_path=paths,
        split="80,20,0",
        dataset="JSON-SFT",
        seq_length=LENGTH,
        max_padding_length=LENGTH,
        sft_packing=True,
    )


def message(text, role="user"):
    return {"role": role, "content": text}


def records_of(config, tokenizer):
    renderer = resolve_renderer(None, tokenizer, "mistral")
    return InstructionDataset(material_of([config.train_data_path[0]], tokenizer, renderer), length=LENGTH)


def segments(row):
    """Tokens, labels and mask of every segment of a sample that has something to learn."""
    begins = np.unique(row.starts)
    parts = (np.split(part, begins[1:]) for part in (row.tokens, row.labels, row.loss_mask))
    return [tuple(map(tuple, piece)) for piece in zip(*parts, strict=True) if piece[2].any()]


def stream(batches):
    return [tuple(row) for step in batches for batch in step for row in batch.tokens.tolist()]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 25), st.integers(1, 8))
def test_every_record_is_in_one_row_and_no_row_is_too_long(sizes, capacity, window):
    rows = list(pack(sizes, capacity, window))
    assert sorted(place for row in rows for place in row) == list(range(len(sizes)))
    assert all(row == sorted(row) and sum(sizes[place] for place in row) <= capacity for row in rows)


@given(st.lists(st.integers(1, 20), max_size=40))
def test_within_the_window_it_is_first_fit(sizes):
    rows, sums = [], []
    for place, size in enumerate(sizes):
        fit = next((k for k, total in enumerate(sums) if total + size <= 20), len(rows))
        if fit == len(rows):
            rows.append([])
            sums.append(0)
        rows[fit].append(place)
        sums[fit] += size
    assert sorted(pack(sizes, 20, window=64)) == sorted(rows)


def test_a_row_beyond_the_window_is_closed():
    assert list(pack([8, 5, 9, 2, 1], 10, window=2)) == [[0], [1, 3, 4], [2]]
    assert list(pack([8, 5, 9, 2, 1], 10, window=3)) == [[0, 3], [1, 4], [2]]


def test_a_packed_row_holds_its_records_as_they_are_alone(config, tokenizer):
    records = records_of(config, tokenizer)
    packed = PackedDataset(records, np.arange(len(records)))
    found = [piece for index in range(len(packed)) for piece in segments(packed[index])]
    wanted = []
    for index in range(len(records)):
        sample, count = records[index], records.tokens(index)
        assert sample.starts is None
        wanted.append(tuple(tuple(part[:count]) for part in sample[:3]))
    assert sorted(found) == sorted(wanted)
    assert len(packed) < 0.7 * len(records) and max(len(segments(packed[i])) for i in range(len(packed))) >= 3


def test_padding_is_a_segment_of_its_own(config, tokenizer):
    records = records_of(config, tokenizer)
    pair = sorted(range(len(records)), key=records.tokens)[:2]
    row = records.joined(pair)
    first, both = records.tokens(pair[0]), sum(map(records.tokens, pair))
    assert both < LENGTH
    assert row.starts.tolist() == [0] * first + [first] * (both - first) + [both] * (LENGTH - both)
    assert not row.loss_mask[both:].any()


def test_the_packed_loss_is_that_of_every_record_alone(config, tokenizer):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GPTModel(MODEL, range(MODEL.num_layers), single_process())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    records = records_of(config, tokenizer)
    packed = PackedDataset(records, np.arange(len(records)))
    rows = [packed[index] for index in range(len(packed))]
    losses, masks = [], []
    for start in range(0, len(rows), 3):
        tokens, labels, mask, starts = (
            torch.from_numpy(np.stack(part)) for part in zip(*rows[start : start + 3], strict=True)
        )
        losses.append((model(tokens, labels, starts) * mask).sum())
        masks.append(mask.sum())
    total = torch.stack(losses).sum() / torch.stack(masks).sum()
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = [[torch.from_numpy(part)[None] for part in records[index][:3]] for index in range(len(records))]
    count = sum(mask.sum() for _, _, mask in alone)
    wanted = sum((model(tokens, labels) * mask).sum() for tokens, labels, mask in alone) / count
    wanted.backward()
    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error <= 1e-5, f"{name}: {error:.1e}"


def test_ranks_and_continued_runs_see_the_same_rows(config, tokenizer):
    whole = stream(training_batches(config, tokenizer, train_iters=6, **SIZES, rank=0, size=1))
    dealt = [stream(training_batches(config, tokenizer, train_iters=6, **SIZES, rank=r, size=2)) for r in range(2)]
    assert [row for four in zip(*[iter(whole)] * 4, strict=True) for row in four[:2]] == dealt[0]
    assert [row for four in zip(*[iter(whole)] * 4, strict=True) for row in four[2:]] == dealt[1]
    rest = stream(training_batches(config, tokenizer, train_iters=6, start_iteration=4, **SIZES, rank=0, size=1))
    assert rest == whole[16:]


def test_batches_carry_the_segments(config, tokenizer):
    (batch, _), *_ = training_batches(config, tokenizer, train_iters=1, **SIZES, rank=0, size=1)
    assert (batch.starts.shape, batch.starts.dtype) == ((2, LENGTH), torch.int64)
    (batch, _), *_ = training_batches(
        replace(config, sft_packing=False), tokenizer, train_iters=1, **SIZES, rank=0, size=1
    )
    assert batch.starts is None


def test_training_and_validation_do_not_share_a_record(config, tokenizer):
    seen = {
        "train": training_batches(config, tokenizer, train_iters=9, **SIZES, rank=0, size=1),
        "valid": validation_batches(config, tokenizer, eval_iters=9, **SIZES, rank=0, size=1),
    }
    rows = {
        name: {row for step in batches for batch in step for row in names(batch, tokenizer)}
        for name, batches in seen.items()
    }
    assert rows["train"] == {f"q{n}" for n in range(24)} and rows["valid"] == {f"q{n}" for n in range(24, 30)}


def names(batch, tokenizer):
    """The questions that a batch holds."""
    return {word for row in batch.tokens for word in tokenizer.decode(row).split() if word[0] == "q"}


def test_the_seed_decides_which_records_meet(config, tokenizer):
    one, other = (
        set(stream(training_batches(replace(config, seed=seed), tokenizer, train_iters=9, **SIZES, rank=0, size=1)))
        for seed in (1, 2)
    )
    assert one != other
