import itertools
from collections import Counter

import pytest
from layouts_of_mcore import CONFIGS, ENTRIES

from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.placement import (
    as_cut,
    check_layout,
    file_slots,
    padded_vocabulary,
    rank_name,
    ranks,
    spelling_of,
    stage_ranges,
)


def spread(layers, **layout):
    return [[list(chunk) for chunk in stage] for stage in stage_ranges(layers, Target(**layout))]


def keys(family, stage, ep_rank, **layout):
    """Names in the files of a stage and expert-parallel rank, by chunk."""
    target = Target(**layout)
    ranges = stage_ranges(CONFIGS[family].num_layers, target)
    slots = list(file_slots(ENTRIES[family], CONFIGS[family], target, ranges, stage, ep_rank))
    chunks = [[slot.key for slot in slots if slot.chunk == chunk] for chunk in range(target.vp)]
    return [sorted(chunk) for chunk in chunks]


def test_virtual_chunks_interleave_as_megatron_core_documents():
    assert spread(8, pp=2, vp=4) == [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]
    assert spread(8, pp=2, vp=2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_the_first_stage_may_have_its_own_number_of_layers():
    assert spread(5, pp=3, first_stage_layers=1) == [[[0]], [[1, 2]], [[3, 4]]]
    assert spread(10, pp=3, first_stage_layers=2, vp=2) == [[[0], [5]], [[1, 2], [6, 7]], [[3, 4], [8, 9]]]


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ({"pp": 3}, "4 layers cannot be shared equally by 3 pipeline stages"),
        ({"pp": 8}, "4 layers cannot be shared equally by 8 pipeline stages"),
        ({"pp": 3, "first_stage_layers": 1}, "3 layers cannot be shared equally by 2 pipeline stages"),
        ({"pp": 2, "first_stage_layers": 4}, "first_stage_layers is 4; it must leave some of the 4 layers"),
        ({"first_stage_layers": 1}, "first_stage_layers is 1, which needs at least two pipeline stages"),
        ({"vp": 2}, "vp is 2, which needs at least two pipeline stages"),
        ({"pp": 2, "vp": 3}, "the 2 layers of a pipeline stage cannot be shared equally by vp 3 chunks"),
        ({"pp": 2, "vp": 2, "first_stage_layers": 1}, "the 1 layers of a pipeline stage cannot be shared equally"),
        ({"tp": 4}, "tp 4 does not divide the 2 query groups"),
        ({"tp": 2, "etp": 4}, "etp is 4; experts are cut as the rest is, by tp 2, or not, by 1"),
        ({"ep": 3}, "ep 3 does not divide 4 experts"),
    ],
)
def test_sizes_that_do_not_divide_the_model_are_refused(layout, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_layout(CONFIGS["mixtral"], Target(**layout))


def test_latent_attention_divides_by_heads_and_a_dense_model_has_no_expert_ranks():
    check_layout(CONFIGS["deepseek_v2"], Target(tp=4))
    with pytest.raises(ValueError, match="tp 8 does not divide the 4 attention heads"):
        check_layout(CONFIGS["deepseek_v2"], Target(tp=8))
    with pytest.raises(ValueError, match="ep is 2, but the model has no experts"):
        check_layout(CONFIGS["mistral"], Target(ep=2))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ({"tp": 4}, "mp_rank_02"),
        ({"tp": 4, "pp": 2}, "mp_rank_02_001"),
        ({"tp": 4, "ep": 8}, "mp_rank_02_005"),
        ({"tp": 4, "pp": 2, "ep": 8}, "mp_rank_02_001_005"),
    ],
)
def test_a_rank_is_named_as_megatron_names_it(layout, name):
    assert rank_name(Target(**layout), 2, 1, 5) == name


def test_a_stage_counts_its_layers_and_its_experts_from_zero():
    attention = ["linear_proj.weight", "linear_qkv.layer_norm_weight", "linear_qkv.weight"]
    block = [f"decoder.layers.0.self_attention.{name}" for name in attention]
    block += ["decoder.layers.0.mlp.router.weight", "decoder.layers.0.pre_mlp_layernorm.weight"]
    experts = [f"decoder.layers.0.mlp.experts.local_experts.{e}.linear_fc{n}.weight" for e in (0, 1) for n in (1, 2)]
    assert keys("mixtral", 0, 1, pp=4, ep=2) == [sorted(["embedding.word_embeddings.weight", *block, *experts])]
    assert keys("mixtral", 2, 1, pp=4, ep=2) == [sorted(block + experts)]
    ends = ["decoder.final_layernorm.weight", "output_layer.weight"]
    assert keys("mixtral", 3, 0, pp=4, ep=2) == [sorted(block + experts + ends)]


def test_chunks_count_their_layers_from_zero_and_the_ends_stand_in_the_first_and_last():
    first, second = keys("mistral", 0, 0, pp=2, vp=2), keys("mistral", 1, 0, pp=2, vp=2)
    layers = [{key.split(".")[2] for key in chunk if ".layers." in key} for chunk in first + second]
    assert layers == [{"0"}] * 4
    assert ["embedding.word_embeddings.weight" in chunk for chunk in first + second] == [True, False, False, False]
    assert ["output_layer.weight" in chunk for chunk in first + second] == [False, False, False, True]
    assert ["decoder.final_layernorm.weight" in chunk for chunk in first + second] == [False, False, False, True]


def test_tied_embeddings_stand_again_as_the_last_stages_output_layer():
    assert "output_layer.weight" not in keys("qwen1_5", 0, 0)[0]
    assert "output_layer.weight" not in keys("qwen1_5", 0, 0, pp=2)[0]
    assert "output_layer.weight" in keys("qwen1_5", 1, 0, pp=2)[0]
    assert "output_layer.weight" not in keys("qwen1_5", 1, 0, pp=2, vp=2)[0]
    assert "output_layer.weight" in keys("qwen1_5", 1, 0, pp=2, vp=2)[1]


def test_latent_attention_and_norms_are_spelled_as_transformer_engine_or_without():
    prefix = "decoder.layers.0."
    te, local = (keys("deepseek_v2", 0, 0, pp=4, transformer_impl=impl)[0] for impl in ("te", "local"))
    assert [key.removeprefix(prefix) for key in te if key not in local] == [
        "mlp.linear_fc1.layer_norm_weight",
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        "self_attention.linear_q_up_proj.layer_norm_weight",
    ]
    assert [key.removeprefix(prefix) for key in local if key not in te] == [
        "pre_mlp_layernorm.weight",
        "self_attention.kv_layernorm.weight",
        "self_attention.q_layernorm.weight",
    ]
    moe = [keys("deepseek_v2", 1, 0, pp=4, transformer_impl=impl)[0] for impl in ("te", "local")]
    assert all("decoder.layers.0.pre_mlp_layernorm.weight" in names for names in moe)
    entries = ENTRIES["deepseek_v2"]
    assert (spelling_of(te, entries), spelling_of(local, entries)) == ("te", "local")


def test_grouped_experts_are_numbered_behind_the_matrix():
    grouped = [key for key in keys("mixtral", 0, 1, pp=4, ep=2, experts="grouped")[0] if ".experts." in key]
    assert grouped == [f"decoder.layers.0.mlp.experts.linear_fc{n}.weight{e}" for n in (1, 2) for e in (0, 1)]


def test_what_is_cut_depends_on_the_implementation_and_on_expert_tensor_parallelism():
    by_name = {entry.mcore: entry for entry in ENTRIES["deepseek_v2"]}
    down = by_name["decoder.layers.1.self_attention.linear_kv_down_proj.weight"]
    expert = by_name["decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"]
    assert as_cut(down, Target(tp=2)).shard is None
    assert as_cut(down, Target(tp=2, transformer_impl="local")).shard == "column"
    assert as_cut(expert, Target(tp=2)).shard == "row"
    assert as_cut(expert, Target(tp=2, etp=1)).shard is None


@pytest.mark.parametrize("family", ENTRIES)
def test_every_layer_stands_on_one_stage_and_every_expert_on_one_rank_of_it(family):
    entries, config = ENTRIES[family], CONFIGS[family]
    for pp, vp, ep, experts in itertools.product((1, 2, 4), (1, 2), (1, 2, 4), ("sequential", "grouped")):
        target = Target(pp=pp, vp=vp, ep=ep, experts=experts)
        try:
            check_layout(config, target)
        except ValueError:
            continue
        ranges = stage_ranges(config.num_layers, target)
        found = Counter()
        for _, stage, ep_rank in ranks(target):
            slots = list(file_slots(entries, config, target, ranges, stage, ep_rank))
            assert len({(slot.chunk, slot.key) for slot in slots}) == len(slots)
            found.update(slot.entry.mcore for slot in slots if slot.key != "output_layer.weight")
        for entry in entries:
            if entry.mcore != "output_layer.weight":
                assert found[entry.mcore] == (1 if entry.expert is not None else ep), (entry, target)


def test_the_padded_vocabulary_divides():
    assert [padded_vocabulary(CONFIGS["mistral"], tp) for tp in (1, 2, 4, 8)] == [21, 22, 24, 24]
