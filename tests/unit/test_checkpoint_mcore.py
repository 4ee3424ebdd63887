import argparse
import dataclasses
import resource
import shutil

import layouts_of_mcore as tiny
import pytest
import torch
from tiny_checkpoint import CONFIG, ENTRIES

from megatron_patch.checkpoint import mcore
from megatron_patch.checkpoint.atomic import move_directory
from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.layouts import cut
from megatron_patch.checkpoint.megatron_args import megatron_args
from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.families.mistral import MISTRAL


def whole_tensors():
    torch.manual_seed(0)
    return {entry.mcore: torch.randn(entry.shape) for entry in ENTRIES}


def save(root, tensors, tp=1, iteration=None, **changed_args):
    args = megatron_args(CONFIG, Target(tp=tp), torch.float32)
    vars(args).update(changed_args)
    for rank in range(tp):
        shards = {entry.mcore: cut(entry, tensors[entry.mcore], rank, tp) for entry in ENTRIES}
        mcore.write_rank(root, iteration, f"mp_rank_{rank:02d}", [shards], args)
    return mcore.publish(root, iteration, [f"mp_rank_{rank:02d}" for rank in range(tp)])


def open_it(root, config=CONFIG):
    return open_checkpoint(root, MISTRAL, config)


def rewrite(path, change):
    payload = torch.load(path, weights_only=False)
    change(payload)
    torch.save(payload, path)


@pytest.mark.parametrize("tp", [1, 2])
def test_what_ranks_wrote_reads_whole(tmp_path, tp):
    tensors = whole_tensors()
    assert save(tmp_path, tensors, tp, iteration=20) == tmp_path / "iter_0000020"
    source = open_it(tmp_path)
    assert all(torch.equal(source.read(entry), tensors[entry.mcore]) for entry in ENTRIES)
    assert source.describe() == f"mcore iter_0000020, tp {tp}, te names, float32"


def test_the_file_is_what_megatron_expects(tmp_path):
    directory = save(tmp_path, whole_tensors(), tp=2)
    assert (tmp_path / mcore.TRACKER).read_text() == "release" and directory.name == "release"
    payload = torch.load(directory / "mp_rank_01" / "model_optim_rng.pt", weights_only=False)
    assert type(payload["args"]) is argparse.Namespace and payload["checkpoint_version"] == 3.0
    assert payload["args"].padded_vocab_size == 22 and payload["args"].window_size == (3, 0)
    shapes = {name.removeprefix("decoder.layers.1."): tuple(tensor.shape) for name, tensor in payload["model"].items()}
    assert shapes["embedding.word_embeddings.weight"] == shapes["output_layer.weight"] == (11, 16)
    assert shapes["self_attention.linear_qkv.weight"] == (16, 16)
    assert shapes["mlp.linear_fc1.weight"] == (24, 16) and shapes["mlp.linear_fc2.weight"] == (16, 12)


def test_a_shard_that_is_a_view_is_saved_alone(tmp_path):
    whole = {entry.mcore: torch.randn(entry.shape) for entry in ENTRIES}
    one, two = save(tmp_path / "one", whole, 1), save(tmp_path / "two", whole, 2)
    size = [(directory / "mp_rank_00" / "model_optim_rng.pt").stat().st_size for directory in (one, two)]
    bytes_of_parameters = sum(tensor.nbytes for tensor in whole.values())
    assert size[0] - size[1] > 0.45 * bytes_of_parameters


def test_nothing_is_visible_before_publishing(tmp_path):
    save(tmp_path, whole_tensors(), iteration=10)
    mcore.write_rank(tmp_path, 20, "mp_rank_00", [{}], argparse.Namespace())
    assert open_it(tmp_path).directory == tmp_path / "iter_0000010"
    with pytest.raises(FileNotFoundError, match=r"mp_rank_01.* was not written"):
        mcore.publish(tmp_path, 20, ["mp_rank_00", "mp_rank_01"])
    assert (tmp_path / mcore.TRACKER).read_text() == "10" and not (tmp_path / "iter_0000020").exists()


def test_an_iteration_that_cannot_be_put_in_place_is_not_named_and_the_one_before_stays(tmp_path, monkeypatch):
    tensors = whole_tensors()
    save(tmp_path, tensors, iteration=10)

    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr(mcore, "move_directory", refuse)
    with pytest.raises(OSError, match="no"):
        save(tmp_path, tensors, iteration=20)
    assert open_it(tmp_path).directory == tmp_path / "iter_0000010"


def test_what_cannot_be_replaced_stays(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "weights").write_text("years")
    with pytest.raises(FileNotFoundError):
        move_directory(tmp_path / "absent", tmp_path / "old")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["old", "old/weights"]


def test_publishing_again_replaces_and_leaves_no_rank_of_another_layout(tmp_path):
    mcore.write_rank(tmp_path, 10, "mp_rank_01", [{}], argparse.Namespace())  # an interrupted save at tp 2
    save(tmp_path, whole_tensors(), iteration=10)
    assert [path.name for path in (tmp_path / "iter_0000010").iterdir()] == ["mp_rank_00"]
    newer = {name: tensor + 1 for name, tensor in whole_tensors().items()}
    save(tmp_path, newer, iteration=10)
    source = open_it(tmp_path)
    assert source.layout["tp"] == 1 and torch.equal(source.read(ENTRIES[1]), newer[ENTRIES[1].mcore])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000010", mcore.TRACKER]


def test_extra_states_are_ignored_and_nothing_else_is(tmp_path):
    path = save(tmp_path, whole_tensors()) / "mp_rank_00" / "model_optim_rng.pt"
    rewrite(path, lambda payload: payload["model"].update({"decoder.layers.0.mlp.linear_fc1._extra_state": None}))
    assert open_it(tmp_path).describe() == "mcore release, tp 1, te names, float32"
    rewrite(path, lambda payload: payload["model"].update({"decoder.layers.0.mlp.linear_fc1.scale": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"1 unknown \(decoder.layers.0.mlp.linear_fc1.scale\)"):
        open_it(tmp_path)


def test_a_checkpoint_without_args_is_read_by_its_names_and_shapes(tmp_path):
    rewrite(save(tmp_path, whole_tensors()) / "mp_rank_00" / "model_optim_rng.pt", lambda payload: payload.pop("args"))
    assert open_it(tmp_path).dtype == torch.float32


def test_args_may_be_a_plain_dict_and_nothing_else(tmp_path):
    path = save(tmp_path, whole_tensors()) / "mp_rank_00" / "model_optim_rng.pt"
    rewrite(path, lambda payload: payload.update(args=vars(payload["args"]) | {"num_layers": 3}))
    with pytest.raises(ValueError, match=r"args.num_layers is 3, config.json says 2"):
        open_it(tmp_path)
    rewrite(path, lambda payload: payload.update(args=5))
    with pytest.raises(ValueError, match=r"args is int, not a namespace"):
        open_it(tmp_path)


def test_a_name_that_is_no_text_is_refused(tmp_path):
    path = save(tmp_path, whole_tensors()) / "mp_rank_00" / "model_optim_rng.pt"
    rewrite(path, lambda payload: payload["model"].update({5: torch.ones(1)}))
    with pytest.raises(ValueError, match=r"5 names a tensor, and a name is text"):
        open_it(tmp_path)


@pytest.mark.parametrize(
    "limit", [512, 20_000]
)  # inside the header, and inside a tensor: torch.save raises differently
def test_a_full_disk_is_told_as_one(tmp_path, limit):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*model_optim_rng.pt"):
            mcore.write_rank(tmp_path, None, "mp_rank_00", [{"x": torch.zeros(100_000)}], argparse.Namespace())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "release").exists()


def test_a_missing_tracker_or_iteration_is_named(tmp_path):
    save(tmp_path, whole_tensors(), iteration=10)
    (tmp_path / mcore.TRACKER).write_text("11\n")
    with pytest.raises(
        FileNotFoundError, match=r"iter_0000011 does not exist, but .*latest_checkpointed_iteration.txt"
    ):
        open_it(tmp_path)
    (tmp_path / mcore.TRACKER).write_text("../other")
    with pytest.raises(ValueError, match=r"says '../other'; it must be release or an iteration number"):
        open_it(tmp_path)
    (tmp_path / mcore.TRACKER).unlink()
    with pytest.raises(FileNotFoundError, match=r"latest_checkpointed_iteration.txt does not exist"):
        open_it(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_is_named(tmp_path, rank):
    directory = save(tmp_path, whole_tensors(), tp=2)
    (directory / f"mp_rank_0{rank}").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"mp_rank_0{rank} does not exist"):
        open_it(tmp_path)


def test_a_rank_too_many_is_refused(tmp_path):
    shutil.copytree(save(tmp_path, whole_tensors()) / "mp_rank_00", tmp_path / "release" / "mp_rank_01")
    with pytest.raises(ValueError, match=r"args.tensor_model_parallel_size is 1, the directory holds 2"):
        open_it(tmp_path)


def test_wrong_shapes_and_names_are_named_with_the_file(tmp_path):
    path = save(tmp_path, whole_tensors()) / "mp_rank_00" / "model_optim_rng.pt"
    rewrite(path, lambda payload: payload["model"].update({"decoder.final_layernorm.weight": torch.ones(15)}))
    with pytest.raises(ValueError, match=r"model_optim_rng.pt: decoder.final_layernorm.weight has shape \(15,\)"):
        open_it(tmp_path)
    rewrite(path, lambda payload: payload["model"].pop("decoder.final_layernorm.weight"))
    with pytest.raises(ValueError, match=r"1 missing \(decoder.final_layernorm.weight\)"):
        open_it(tmp_path)
    rewrite(path, lambda payload: payload.update(model=[1]))
    with pytest.raises(ValueError, match=r"holds no dict under 'model'"):
        open_it(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("rotary_base", 1e6), ("num_layers", 3), ("vocab_size", 20)])
def test_args_that_contradict_config_json_are_an_error_with_both_values(tmp_path, field, value):
    save(tmp_path, whole_tensors())
    other = dataclasses.replace(CONFIG, **{field: value})
    with pytest.raises(ValueError, match=rf"args.{field} is {getattr(CONFIG, field)}, config.json says {value}"):
        open_it(tmp_path, other)


def test_megatrons_default_of_one_query_group_without_gqa_is_understood(tmp_path):
    save(tmp_path, whole_tensors(), group_query_attention=False, num_query_groups=1)
    with pytest.raises(ValueError, match=r"args.num_query_groups is 4, config.json says 2"):
        open_it(tmp_path)


LAYOUTS = [
    ("mistral", {"tp": 2, "pp": 4}, "tp 2 pp 4 first_stage_layers 1, te"),
    ("mistral", {"pp": 2, "vp": 2, "transformer_impl": "local"}, "tp 1 pp 2 vp 2 first_stage_layers 2, local"),
    ("qwen1_5", {"tp": 2, "pp": 2, "first_stage_layers": 1}, "tp 2 pp 2 first_stage_layers 1, te"),
    ("mixtral", {"tp": 2, "pp": 2, "ep": 2, "experts": "grouped"}, "tp 2 pp 2 ep 2 first_stage_layers 2, te"),
    ("mixtral", {"tp": 2, "ep": 4, "etp": 1, "transformer_impl": "local"}, "tp 2 ep 4 etp 1, local"),
    ("deepseek_v2", {"tp": 4, "pp": 2, "vp": 2, "ep": 2}, "tp 4 pp 2 ep 2 vp 2 first_stage_layers 2, te"),
    (
        "deepseek_v2",
        {"tp": 2, "pp": 2, "first_stage_layers": 3, "transformer_impl": "local"},
        "tp 2 pp 2 first_stage_layers 3, local",
    ),
]


@pytest.mark.parametrize(("family", "layout", "phrase"), LAYOUTS, ids=[f"{case[0]} {case[2]}" for case in LAYOUTS])
@pytest.mark.parametrize("has_args", [True, False])
def test_any_layout_reads_whole_and_is_recognised_without_its_args(tmp_path, family, layout, phrase, has_args):
    written = tiny.write(tmp_path, family, **layout)
    if not has_args:
        for directory in (tmp_path / "release").iterdir():
            tiny.rewrite(tmp_path, directory.name, lambda payload: payload.pop("args"))
    source = tiny.open_it(tmp_path, family)
    assert source.describe() == f"mcore release, {phrase} names, float32"
    assert source.target.experts == layout.get("experts", "sequential")
    tiny.check_equal(source, written, family)


def test_a_rank_file_holds_its_stage_its_heads_and_its_experts(tmp_path):
    written = tiny.write(tmp_path, "mixtral", tp=2, pp=2, ep=2).tensors
    model = tiny.payload_of(tmp_path, "mp_rank_01_001_001")["model"]
    third = "decoder.layers.3.mlp.experts.local_experts.2"  # the first of the second half
    here = "decoder.layers.1.mlp.experts.local_experts.0"
    gate_up = written[f"{third}.linear_fc1.weight"]
    assert torch.equal(model[f"{here}.linear_fc1.weight"], torch.cat([gate_up[12:24], gate_up[36:48]]))
    assert torch.equal(model[f"{here}.linear_fc2.weight"], written[f"{third}.linear_fc2.weight"][:, 12:])
    qkv = "self_attention.linear_qkv.weight"
    assert torch.equal(model[f"decoder.layers.0.{qkv}"], written[f"decoder.layers.2.{qkv}"][16:])
    assert torch.equal(model["decoder.layers.1.mlp.router.weight"], written["decoder.layers.3.mlp.router.weight"])
    assert len(model["output_layer.weight"]) == 11 and not model["output_layer.weight"][-1].any()
    assert "embedding.word_embeddings.weight" not in model


def test_args_record_the_layout_and_what_megatron_needs_to_build_the_model(tmp_path):
    tiny.write(tmp_path, "deepseek_v2", tp=2, pp=2, ep=4, etp=1, first_stage_layers=1)
    args = vars(tiny.payload_of(tmp_path, "mp_rank_00_000_000")["args"])
    wanted = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "decoder_first_pipeline_num_layers": 1,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": 12,
        "num_experts": 4,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_shared_expert_intermediate_size": 16,
        "moe_router_pre_softmax": True,
        "padded_vocab_size": 22,
    }
    assert {name: args[name] for name in wanted} == wanted


def test_grouped_experts_of_megatron_core_before_transformer_engine_are_read(tmp_path):
    """`experts.weight1` is viewed as (experts, hidden, 2·ffn) by the module that owns it, `weight2` as its second."""
    written = tiny.write(tmp_path, "mixtral", tp=2, ep=2)

    def pack(model):
        for layer in range(4):
            prefix = f"decoder.layers.{layer}.mlp.experts."
            for number, shape in (("1", (16, -1)), ("2", (-1, 16))):
                names = [f"{prefix}local_experts.{expert}.linear_fc{number}.weight" for expert in range(2)]
                model[f"{prefix}weight{number}"] = torch.stack([model.pop(name).t() for name in names]).view(shape)

    for directory in (tmp_path / "release").iterdir():
        tiny.rewrite(tmp_path, directory.name, lambda payload: pack(payload["model"]))
    model = tiny.payload_of(tmp_path, "mp_rank_00_000")["model"]
    assert model["decoder.layers.0.mlp.experts.weight1"].shape == (16, 2 * 24)
    assert model["decoder.layers.0.mlp.experts.weight2"].shape == (2 * 12, 16)
    tiny.check_equal(tiny.open_it(tmp_path, "mixtral"), written, "mixtral")


def test_down_projections_are_read_whole_or_cut(tmp_path):
    name = "decoder.layers.0.self_attention.linear_kv_down_proj.weight"
    for impl, rows in (("te", 8), ("local", 4)):
        tiny.write(tmp_path / impl, "deepseek_v2", tp=2, transformer_impl=impl)
        assert len(tiny.payload_of(tmp_path / impl, "mp_rank_01")["model"][name]) == rows
    mixed = tiny.payload_of(tmp_path / "local", "mp_rank_01")["model"][name]
    tiny.rewrite(tmp_path / "te", "mp_rank_01", lambda payload: payload["model"].update({name: mixed}))
    with pytest.raises(ValueError, match=r"kv_down_proj.weight is torch.float32 \(8, 16\) in .*, but .* \(4, 16\) in"):
        tiny.open_it(tmp_path / "te", "deepseek_v2")


def test_the_former_names_of_latent_attention_and_shared_experts_are_read(tmp_path):
    written = tiny.write(tmp_path, "deepseek_v2", transformer_impl="local")
    former = {
        "q_layernorm": "q_a_layernorm",
        "kv_layernorm": "kv_a_layernorm",
        "linear_q_down_proj": "linear_q_a_proj",
        "linear_q_up_proj": "linear_q_b_proj",
        "linear_kv_down_proj": "linear_kv_a_proj_with_mqa",
        "linear_kv_up_proj": "linear_kv_b_proj",
        "shared_experts": "shared_expert",
    }

    def rename(payload):
        model = payload["model"]
        payload["model"] = {".".join(former.get(part, part) for part in key.split(".")): model[key] for key in model}

    tiny.rewrite(tmp_path, "mp_rank_00", rename)
    tiny.check_equal(tiny.open_it(tmp_path, "deepseek_v2"), written, "deepseek_v2")


def test_a_tensor_under_two_names_is_refused(tmp_path):
    tiny.write(tmp_path, "mistral")
    te, local = "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
    layer = "decoder.layers.2."
    tiny.rewrite(
        tmp_path, "mp_rank_00", lambda payload: payload["model"].update({layer + local: payload["model"][layer + te]})
    )
    with pytest.raises(ValueError, match=rf"mp_rank_00.* holds {layer}{te} under two of its names"):
        tiny.open_it(tmp_path, "mistral")


def test_files_that_megatron_does_not_write_for_uncut_experts_may_be_missing(tmp_path):
    """With experts uncut Megatron writes one file per expert-parallel rank: here tp rank 0 has ep rank 0, 1 has 1."""
    written = tiny.write(tmp_path, "mixtral", tp=2, ep=2, etp=1)
    for name in ("mp_rank_00_001", "mp_rank_01_000"):
        shutil.rmtree(tmp_path / "release" / name)
    tiny.check_equal(tiny.open_it(tmp_path, "mixtral"), written, "mixtral")
    shutil.rmtree(tmp_path / "release" / "mp_rank_01_001")
    with pytest.raises(FileNotFoundError, match=r"mp_rank_00_001 does not exist"):
        tiny.open_it(tmp_path, "mixtral")


@pytest.mark.parametrize(
    ("layout", "gone"),
    [
        ({"tp": 2, "ep": 2}, "mp_rank_00_001"),
        ({"pp": 2}, "mp_rank_00_001"),
        ({"pp": 2}, "mp_rank_00_000"),
        ({"tp": 2, "pp": 2, "ep": 2}, "mp_rank_01_001_000"),
    ],
)
def test_a_missing_stage_or_share_of_the_experts_is_named(tmp_path, layout, gone):
    tiny.write(tmp_path, "mixtral", **layout)
    shutil.rmtree(tmp_path / "release" / gone)
    with pytest.raises(FileNotFoundError, match=rf"{gone} does not exist"):
        tiny.open_it(tmp_path, "mixtral")


@pytest.mark.parametrize(
    ("family", "layout", "rank", "name"),
    [
        ("mistral", {"tp": 2}, "mp_rank_01", "decoder.final_layernorm.weight"),
        ("mixtral", {"ep": 2}, "mp_rank_00_001", "decoder.layers.2.self_attention.linear_proj.weight"),
        ("qwen1_5", {"pp": 2}, "mp_rank_00_001", "output_layer.weight"),
        (
            "mixtral",
            {"tp": 2, "etp": 1},
            "mp_rank_01",
            "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight",
        ),
    ],
)
def test_copies_that_differ_are_told_with_both_files(tmp_path, family, layout, rank, name):
    tiny.write(tmp_path, family, **layout)
    tiny.rewrite(tmp_path, rank, lambda payload: payload["model"][name].flatten()[0].add_(1))
    source = tiny.open_it(tmp_path, family)
    wanted = name if family != "qwen1_5" else "embedding.word_embeddings.weight"
    entry = next(entry for entry in tiny.ENTRIES[family] if entry.mcore == wanted)
    with pytest.raises(ValueError, match=rf"model_optim_rng.pt and .*{rank}.* hold different copies of {wanted}"):
        source.read(entry)


def test_a_vocabulary_padded_further_is_read_without_its_padding(tmp_path):
    written = tiny.write(tmp_path, "mistral", tp=2)

    def pad(payload):  # to 32 rows a rank, of which the second has none of the vocabulary's
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            whole = written.tensors[name]
            rank = [torch.cat([whole, whole[-1:].expand(11, -1)]), whole[-1:].expand(32, -1)]
            payload["model"][name] = rank[payload["rank"]].clone()

    for rank in (0, 1):
        tiny.rewrite(tmp_path, f"mp_rank_0{rank}", lambda payload, rank=rank: pad(payload | {"rank": rank}))
    tiny.check_equal(tiny.open_it(tmp_path, "mistral"), written, "mistral")
    taller = {"output_layer.weight": torch.zeros(33, 16)}
    tiny.rewrite(tmp_path, "mp_rank_01", lambda payload: payload["model"].update(taller))
    with pytest.raises(
        ValueError, match=r"output_layer.weight is .* \(32, 16\) in .*, but .* \(33, 16\) in .*mp_rank_01"
    ):
        tiny.open_it(tmp_path, "mistral")


def test_copies_of_a_nan_are_equal(tmp_path):
    tiny.write(tmp_path, "mistral", tp=2)
    name = "decoder.final_layernorm.weight"
    for rank in ("mp_rank_00", "mp_rank_01"):
        tiny.rewrite(tmp_path, rank, lambda payload: payload["model"][name][0].fill_(float("nan")))
    entry = next(entry for entry in tiny.ENTRIES["mistral"] if entry.mcore == name)
    assert tiny.open_it(tmp_path, "mistral").read(entry)[0].isnan()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("pipeline_model_parallel_size", 1, "is 1, the directory holds 2"),
        ("expert_model_parallel_size", 1, "is 1, the directory holds 2"),
        ("expert_tensor_parallel_size", 1, "is 1, the directory holds 2"),
        ("virtual_pipeline_model_parallel_size", 4, "is 4, the directory holds 2"),
        ("decoder_first_pipeline_num_layers", 1, "is 1, the directory holds 2"),
        ("num_experts", 8, "is 8, config.json says 4"),
        ("moe_ffn_hidden_size", 32, "is 32, config.json says 24"),
    ],
)
def test_args_that_contradict_the_files_are_an_error_with_both_values(tmp_path, name, value, sentence):
    tiny.write(tmp_path, "mixtral", tp=2, pp=2, vp=2, ep=2)
    tiny.rewrite(tmp_path, "mp_rank_01_001_001", lambda payload: setattr(payload["args"], name, value))
    with pytest.raises(ValueError, match=rf"mp_rank_01_001_001.*args.{name} {sentence}"):
        tiny.open_it(tmp_path, "mixtral")


def test_a_layer_or_an_expert_too_few_or_too_many_is_told(tmp_path):
    tiny.write(tmp_path, "mixtral", pp=2, ep=2)
    expert = "decoder.layers.1.mlp.experts.local_experts.{}.linear_fc1.weight"

    def rename(payload):
        payload["model"][expert.format(2)] = payload["model"].pop(expert.format(1))

    tiny.rewrite(tmp_path, "mp_rank_00_001_000", rename)
    with pytest.raises(ValueError, match=r"mp_rank_00_001_000.* 1 missing \(decoder.layers.3.*experts.1.*; 1 unknown"):
        tiny.open_it(tmp_path, "mixtral")

    def drop_layer(payload):
        payload["model"] = {key: value for key, value in payload["model"].items() if ".layers.1." not in key}

    for rank in ("mp_rank_00_001_000", "mp_rank_00_001_001"):
        tiny.rewrite(tmp_path, rank, drop_layer)
    with pytest.raises(ValueError, match=r"release holds 3 layers, config.json says 4"):
        tiny.open_it(tmp_path, "mixtral")


def test_directories_of_different_layouts_or_of_no_rank_are_refused(tmp_path):
    directory = tiny.write(tmp_path, "mixtral", tp=2) and tmp_path / "release"
    shutil.copytree(directory / "mp_rank_01", directory / "mp_rank_01_001")
    with pytest.raises(ValueError, match=r"release mixes the rank files of different layouts"):
        tiny.open_it(tmp_path, "mixtral")
    (directory / "mp_rank_01_001").rename(directory / "mp_rank_1")
    with pytest.raises(ValueError, match=r"mp_rank_1 is not a rank's directory"):
        tiny.open_it(tmp_path, "mixtral")


def test_experts_of_another_number_than_config_json_says_are_told(tmp_path):
    tiny.write(tmp_path, "mixtral", ep=4)
    for rank in range(4):
        tiny.rewrite(tmp_path, f"mp_rank_00_00{rank}", lambda payload: payload.pop("args"))
    shutil.copytree(tmp_path / "release" / "mp_rank_00_003", tmp_path / "release" / "mp_rank_00_004")
    with pytest.raises(ValueError, match=r"release has 5 expert-parallel ranks, config.json 4 experts"):
        tiny.open_it(tmp_path, "mixtral")
