import dataclasses

import pytest
import torch
from tiny_checkpoint import CONFIG, ENTRIES

from megatron_patch.checkpoint import layouts
from megatron_patch.families.manifest import Entry

QKV = Entry("qkv.weight", ("q", "k", "v"), "qkv", "column", (16, 1), 0)
FC1 = Entry("fc1.weight", ("gate", "up"), "gate_up", "column", (8, 1), 0)
VOCAB = Entry("embedding.weight", ("embed",), "copy", "vocab", (5, 2), None)
FOUR_HEADS_TWO_GROUPS = dataclasses.replace(CONFIG, num_attention_heads=4, num_query_groups=2, kv_channels=2)


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def test_qkv_is_packed_per_query_group():
    parts = [rows(*range(8)), rows(*range(100, 104)), rows(*range(200, 204))]
    whole = layouts.merge(QKV, parts, FOUR_HEADS_TWO_GROUPS)
    assert whole.flatten().tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    second = layouts.cut(QKV, whole, rank=1, size=2)
    assert second.flatten().tolist() == [4, 5, 6, 7, 102, 103, 202, 203]


def test_a_gate_up_shard_is_the_ranks_gate_then_the_ranks_up():
    whole = layouts.merge(FC1, [rows(0, 1, 2, 3), rows(10, 11, 12, 13)], CONFIG)
    assert layouts.cut(FC1, whole, rank=0, size=2).flatten().tolist() == [0, 1, 10, 11]
    assert layouts.cut(FC1, whole, rank=1, size=2).flatten().tolist() == [2, 3, 12, 13]


def test_vocabulary_shards_are_padded_with_zeros_and_stripped_again():
    whole = torch.arange(1.0, 11.0).reshape(5, 2)
    shards = [layouts.cut(VOCAB, whole, rank, 4) for rank in range(4)]
    assert [shard.tolist() for shard in shards] == [
        [[1, 2], [3, 4]],
        [[5, 6], [7, 8]],
        [[9, 10], [0, 0]],
        [[0, 0], [0, 0]],
    ]
    assert torch.equal(layouts.join(VOCAB, shards), whole)


def test_padding_that_another_program_chose_is_stripped():
    whole = torch.arange(16.0).reshape(8, 2)
    assert torch.equal(layouts.join(VOCAB, [whole]), whole[:5])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("entry", ENTRIES[:9], ids=lambda entry: entry.mcore)
def test_split_undoes_merge_and_join_undoes_cut(entry, size):
    parts = [torch.randn(shape) for shape in layouts.part_shapes(entry, CONFIG)]
    whole = layouts.merge(entry, parts, CONFIG)
    assert tuple(whole.shape) == entry.shape
    shards = [layouts.cut(entry, whole, rank, size) for rank in range(size)]
    assert all(tuple(shard.shape) == layouts.shard_shape(entry, size) for shard in shards)
    back = layouts.split(entry, layouts.join(entry, shards), CONFIG)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(back, parts, strict=True))


def test_sizes_that_do_not_divide_name_the_entry_its_size_and_tp():
    with pytest.raises(ValueError, match=r"fc1.weight: 4 is not divisible by tp 3"):
        layouts.cut(FC1, torch.zeros(8, 1), rank=0, size=3)


def test_a_qkv_shard_holds_whole_query_groups():
    with pytest.raises(ValueError, match=r"qkv.weight has 2 query groups, which tp 4 does not divide"):
        layouts.check_divides(QKV, FOUR_HEADS_TWO_GROUPS, 4)


def test_replicas_that_differ_are_refused():
    norm = Entry("norm.weight", ("norm",), "copy", None, (2,), None)
    with pytest.raises(ValueError, match=r"norm.weight is replicated, but tensor-parallel ranks 0 and 1 differ"):
        layouts.join(norm, [torch.ones(2), torch.zeros(2)])
