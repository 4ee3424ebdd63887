"""Files of a classic checkpoint that do not fit together are told, with the file."""

import shutil

import layouts_of_mcore as tiny
import pytest


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
