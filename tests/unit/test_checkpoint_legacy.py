import argparse
import re
import shutil
import types

import pytest
import torch
from legacy_checkpoint import encoder, payload, rewrite, tiny

from megatron_patch.checkpoint.formats import detect_format
from megatron_patch.checkpoint.layouts import merge

EMBEDDING = "embedding.word_embeddings.weight"


@pytest.mark.parametrize(
    ("format", "family", "options"),
    [
        ("megatron", "mistral", {}),
        ("megatron", "qwen1_5", {"tie_word_embeddings": True}),
        ("modellink", "llama", {}),
        ("modellink", "qwen1_5", {"tie_word_embeddings": True}),
        ("modellink", "mixtral", {"num_local_experts": 4}),
        ("mixtral_train", "mixtral", {"num_local_experts": 4}),
        ("megablocks", "mixtral", {"num_local_experts": 4}),
        (
            "megablocks",
            "qwen1_5_moe",
            {"num_experts": 4, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 0},
        ),
    ],
)
def test_every_layout_reads_back_and_says_what_it_is(tmp_path, format, family, options):
    model = tiny(family, **options)
    layouts = [{}, {"tp": 2}, {"pp": 4}, {"tp": 2, "pp": 2}]
    if model.config.num_moe_experts:
        layouts += [{"ep": 2}, {"pp": 2, "ep": 4}, {"tp": 2, "pp": 2, "ep": 2}]
    for number, layout in enumerate(layouts):
        directory = model.write(tmp_path / str(number), format, **layout)
        assert detect_format(directory).name == format
        source = model.open(directory)
        model.assert_held_by(source)
        assert ({"tp": 1, "pp": 1, "ep": 1} | layout).items() <= source.layout.items()
        assert {path.name for path in directory.iterdir()} == {"release", "latest_checkpointed_iteration.txt"}
    assert source.describe().startswith(f"{format} release, tp ")


def test_the_tree_is_megatrons_with_pais_names_and_extras(tmp_path):
    model = tiny("mistral").write(tmp_path / "m", "megatron")
    content = payload(model)
    assert type(content["args"]) is argparse.Namespace and content["checkpoint_version"] == 3.0
    assert sorted(content["model"]) == ["language_model", "lm_head", "word_embeddings_for_head"]
    tree = content["model"]["language_model"]
    assert sorted(tree) == ["embedding", "encoder", "output_layer"]
    embedding, output = tree["embedding"]["word_embeddings"]["weight"], tree["output_layer"]["weight"]
    assert torch.equal(content["model"]["word_embeddings_for_head"]["weight"], embedding)
    assert torch.equal(content["model"]["lm_head"]["weight"], output)
    assert {re.sub(r"layers\.\d", "layers.N", name) for name in tree["encoder"]} == {
        "final_layernorm.weight",
        "layers.N.input_layernorm.weight",
        "layers.N.post_attention_layernorm.weight",
        "layers.N.self_attention.query_key_value.weight",
        "layers.N.self_attention.dense.weight",
        "layers.N.mlp.dense_h_to_4h.weight",
        "layers.N.mlp.dense_4h_to_h.weight",
    }


def test_modellink_spells_norms_its_own_way_and_keeps_w1_w2_w3_apart(tmp_path):
    model = tiny("mixtral", num_local_experts=4).write(tmp_path / "m", "modellink", tp=2, ep=2)
    flat = encoder(model, "mp_rank_01_001")
    moe, names = "layers.0.mlp.block.moe_layer.", {name for name in flat if "layers.0" in name or "final" in name}
    experts = {f"{moe}experts.experts.{e}.w{n}.weight" for e in (0, 1) for n in (1, 2, 3)}
    assert names == experts | {
        "final_norm.weight",
        "layers.0.input_norm.weight",
        "layers.0.post_attention_norm.weight",
        "layers.0.self_attention.query_key_value.weight",
        "layers.0.self_attention.dense.weight",
        f"{moe}gate.weight.weight",
    }
    shapes = [tuple(flat[f"{moe}experts.experts.0.w{n}.weight"].shape) for n in (1, 2, 3)]
    assert shapes == [(6, 8), (8, 6), (6, 8)]
    fc1 = tiny("mixtral", num_local_experts=4).tensors["decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight"]
    assert torch.equal(flat[f"{moe}experts.experts.0.w1.weight"], fc1[6:12])  # gate rows of tensor rank 1
    assert torch.equal(flat[f"{moe}experts.experts.0.w3.weight"], fc1[18:])


def test_stages_count_their_layers_from_zero_and_hold_their_ends(tmp_path):
    model = tiny("mistral")
    directory = model.write(tmp_path / "m", "modellink", pp=2)
    first, last = (payload(directory, f"mp_rank_00_00{stage}")["model"]["language_model"] for stage in (0, 1))
    assert sorted(first) == ["embedding", "encoder"] and sorted(last) == ["encoder", "output_layer"]
    assert "final_norm.weight" in last["encoder"] and "final_norm.weight" not in first["encoder"]
    norm = last["encoder"]["layers.1.input_norm.weight"]
    assert torch.equal(norm, model.tensors["decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"])


def test_a_tied_output_layer_stands_on_the_last_stage_where_megatron_looks_for_it(tmp_path):
    model = tiny("qwen1_5", tie_word_embeddings=True)
    last = payload(model.write(tmp_path / "two", "modellink", pp=2), "mp_rank_00_001")["model"]
    assert torch.equal(last["word_embeddings_for_head"]["weight"], model.tensors[EMBEDDING])
    assert "output_layer" not in last["language_model"]
    assert list(payload(model.write(tmp_path / "one", "modellink"))["model"]) == ["language_model"]


def test_query_key_value_rows_stand_group_by_group(tmp_path):
    """4 heads, 2 groups, 2 channels: q rows 0-7, k rows 100-103, v rows 200-203, cut by two ranks."""
    model = tiny("mistral", hidden_size=8, num_hidden_layers=1)
    rows = [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    hf = [list(range(8)), list(range(100, 104)), list(range(200, 204))]
    entry = next(entry for entry in model.entries if entry.layout == "qkv")
    parts = [torch.tensor(part).float()[:, None].expand(-1, 8) for part in hf]
    model.tensors[entry.mcore] = merge(entry, parts, model.config)
    directory = model.write(tmp_path / "m", "megatron", tp=2)
    found = [
        encoder(directory, f"mp_rank_0{rank}")["layers.0.self_attention.query_key_value.weight"] for rank in (0, 1)
    ]
    assert [shard[:, 0].tolist() for shard in found] == [rows[:8], rows[8:]]


@pytest.mark.parametrize(("vocabulary", "tp", "padded"), [(32001, 2, 32002), (32000, 2, 32000), (21, 2, 22)])
def test_padding_repeats_the_last_row_is_recorded_and_is_cut_off(tmp_path, vocabulary, tp, padded):
    model = tiny("mistral", vocab_size=vocabulary, num_hidden_layers=1)
    directory = model.write(tmp_path / "m", "megatron", tp=tp)
    last = payload(directory, f"mp_rank_0{tp - 1}")
    assert (last["args"].vocab_size, last["args"].padded_vocab_size) == (vocabulary, padded)
    for tree, name in (("embedding", EMBEDDING), ("output_layer", "output_layer.weight")):
        held = last["model"]["language_model"][tree]
        held = held["word_embeddings"]["weight"] if tree == "embedding" else held["weight"]
        assert len(held) == padded // tp
        assert all(torch.equal(row, model.tensors[name][-1]) for row in held[len(held) - (padded - vocabulary) :])
    model.assert_held_by(model.open(directory))


def test_a_last_rank_without_a_row_of_its_own_is_all_padding(tmp_path):
    model = tiny("llama", vocab_size=5, num_key_value_heads=4)
    directory = model.write(tmp_path / "m", "modellink", tp=4)
    held = payload(directory, "mp_rank_03")["model"]["language_model"]["embedding"]["word_embeddings"]["weight"]
    assert torch.equal(held, model.tensors[EMBEDDING][-1:].expand(2, -1))
    model.assert_held_by(model.open(directory))


def test_a_file_as_pais_converter_and_trainer_leave_it_is_read(tmp_path):
    """SimpleNamespace arguments with few names, more vocabulary rows than the model has, no copies, extra state."""
    model = tiny("mistral", num_hidden_layers=1)
    t, layer = model.tensors, "decoder.layers.0."
    pad = torch.zeros(3, 8)
    encoder = {
        "layers.0.input_layernorm.weight": t[layer + "self_attention.linear_qkv.layer_norm_weight"],
        "layers.0.self_attention.query_key_value.weight": t[layer + "self_attention.linear_qkv.weight"],
        "layers.0.self_attention.query_key_value._extra_state": None,
        "layers.0.self_attention.rotary_emb.inv_freq": torch.ones(1),
        "layers.0.self_attention.dense.weight": t[layer + "self_attention.linear_proj.weight"],
        "layers.0.post_attention_layernorm.weight": t[layer + "mlp.linear_fc1.layer_norm_weight"],
        "layers.0.mlp.dense_h_to_4h.weight": t[layer + "mlp.linear_fc1.weight"],
        "layers.0.mlp.dense_4h_to_h.weight": t[layer + "mlp.linear_fc2.weight"],
        "final_layernorm.weight": t["decoder.final_layernorm.weight"],
    }
    language_model = {
        "embedding": {"word_embeddings": {"weight": torch.cat([t[EMBEDDING], pad])}},
        "encoder": encoder,
        "output_layer": {"weight": torch.cat([t["output_layer.weight"], pad])},
    }
    args = types.SimpleNamespace(orig_vocab_size=21, padded_vocab_size=24, hidden_size=8, params_dtype=torch.float32)
    rank = tmp_path / "iter_0000007" / "mp_rank_00"
    rank.mkdir(parents=True)
    content = {"args": args, "checkpoint_version": 3.0, "model": {"language_model": language_model}}
    torch.save(content | {"optimizer": {"state": torch.ones(3)}}, rank / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert detect_format(tmp_path).name == "megatron"
    model.assert_held_by(model.open(tmp_path))


def drop(tree, name):
    del tree["model"]["language_model"]["encoder"][name]


def put(tree, name, tensor):
    tree["model"]["language_model"]["encoder"][name] = tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: drop(p, "layers.2.self_attention.dense.weight"), "1 missing .*layers.2.self_attention.dense.weight"),
        (lambda p: put(p, "layers.0.self_attention.dense.bias", torch.ones(8)), "1 unknown .*dense.bias"),
        (lambda p: put(p, "layers.0.mlp.dense_4h_to_h.weight", torch.ones(12, 8)), r"has shape \(12, 8\).* \(8, 12\)"),
        (lambda p: put(p, "final_layernorm.weight", torch.ones(8, dtype=torch.int32)), "is torch.int32; supported"),
        (lambda p: put(p, "final_layernorm.weight", "text"), "final_layernorm.weight is str, not a tensor"),
        (lambda p: p["model"]["lm_head"]["weight"].add_(1), "lm_head.weight differs from output_layer.weight"),
        (lambda p: p.update(checkpoint_version=1.0), "checkpoint_version 1.0, which orders QKV otherwise"),
        (lambda p: p.update(model0=p.pop("model")), "holds no dict under 'model'; interleaved"),
        (lambda p: setattr(p["args"], "hidden_size", 9), "args.hidden_size is 9, config.json says 8"),
        (lambda p: setattr(p["args"], "tensor_model_parallel_size", 2), "args.tensor_model_parallel_size is 2"),
    ],
)
def test_a_file_that_is_not_this_model_is_told(tmp_path, change, message):
    model = tiny("mistral")
    directory = model.write(tmp_path / "m", "megatron")
    legacy = detect_format(directory)
    rewrite(directory, change)
    assert detect_format(directory) is legacy or "interleaved" in message
    with pytest.raises(ValueError, match=message):
        legacy.open(directory, model.entries, model.config)


@pytest.mark.parametrize(
    ("weight", "change"),
    [
        ("layers.0.self_attention.query_key_value.weight", lambda tensor: tensor.half()),  # the others would be rounded
        ("embedding", lambda tensor: torch.cat([tensor, tensor])),  # the other's rows would stand too far down
    ],
    ids=["type", "padding"],
)
def test_shards_that_do_not_go_together_are_told_with_both_files(tmp_path, weight, change):
    model = tiny("mistral")
    directory = model.write(tmp_path / "m", "megatron", tp=2)

    def spoil(content):
        model = content["model"]["language_model"]
        holder = model["embedding"]["word_embeddings"] if weight == "embedding" else model["encoder"]
        key = "weight" if weight == "embedding" else weight
        holder[key] = change(holder[key])

    rewrite(directory, spoil)
    with pytest.raises(
        ValueError, match=r"weight is torch\.float.* in .*mp_rank_00/.*, but torch\.float32 .*mp_rank_01/"
    ):
        model.open(directory)


def test_replicas_that_differ_are_told_with_their_ranks(tmp_path):
    model = tiny("mixtral", num_local_experts=4)
    directory = model.write(tmp_path / "m", "modellink", tp=2, ep=2)
    norm = "layers.0.input_norm.weight"
    rewrite(directory, lambda p: p["model"]["language_model"]["encoder"][norm].add_(1), "mp_rank_01_001")
    entry = next(
        entry for entry in model.entries if entry.mcore.endswith("0.self_attention.linear_qkv.layer_norm_weight")
    )
    with pytest.raises(
        ValueError, match=r"ranks \(0, 0, 0\) and \(1, 0, 1\) hold different copies of decoder.layers.0"
    ):
        model.open(directory).read(entry)


def test_a_missing_rank_and_a_stray_directory_are_named(tmp_path):
    model = tiny("mistral")
    directory = model.write(tmp_path / "m", "megatron", tp=2, pp=2)
    legacy = detect_format(directory)
    shutil.rmtree(directory / "release" / "mp_rank_00_001")
    with pytest.raises(FileNotFoundError, match=r"lacks the file of tensor, pipeline and expert rank \(0, 1, 0\)"):
        legacy.open(directory, model.entries, model.config)
    (directory / "release" / "mp_rank_7").mkdir()
    with pytest.raises(ValueError, match="mp_rank_7 is no rank's directory"):
        legacy.open(directory, model.entries, model.config)


def test_stages_that_lack_layers_are_counted(tmp_path):
    directory = tiny("mistral").write(tmp_path / "m", "megatron", pp=2)
    more = tiny("mistral", num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"args.num_layers is 4, config.json says 5"):
        more.open(directory)
    for rank in ("mp_rank_00_000", "mp_rank_00_001"):
        rewrite(directory, lambda p: p.pop("args"), rank)
    with pytest.raises(ValueError, match=r"holds 4 layers, config.json says 5"):
        more.open(directory)


@pytest.mark.parametrize(
    ("format", "family", "options", "layout", "message"),
    [
        ("megatron", "mixtral", {}, {}, "megatron has no place for decoder.layers.0.*; write this model as mcore"),
        ("modellink", "qwen1_5_moe", {"num_experts": 2}, {}, "modellink has no place for .*shared_experts"),
        ("mixtral_train", "mistral", {}, {}, "mixtral_train holds mixtures of experts and this model is dense"),
        ("megablocks", "mistral", {}, {}, "megablocks holds mixtures of experts and this model is dense"),
        ("megatron", "mistral", {}, {"tp": 4}, "tp 4 does not divide the 2 query groups"),
        ("megatron", "mistral", {}, {"pp": 3}, "4 layers cannot be shared equally by 3"),
        ("modellink", "mixtral", {"num_local_experts": 4}, {"ep": 3}, "ep 3 does not divide 4 experts"),
    ],
)
def test_what_a_format_cannot_hold_is_told_before_anything_is_written(
    tmp_path, format, family, options, layout, message
):
    with pytest.raises(ValueError, match=message):
        tiny(family, **options).write(tmp_path / "m", format, **layout)
    assert not any((tmp_path / "m").iterdir())


def test_a_megatron_core_checkpoint_is_not_taken_for_a_legacy_one(tmp_path):
    model = tiny("mistral")
    assert detect_format(model.write(tmp_path / "m", "mcore", tp=2)).name == "mcore"
