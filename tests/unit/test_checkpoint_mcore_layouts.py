"""Classic checkpoints over many files: which rank holds what, on every layout."""

import shutil

import layouts_of_mcore as tiny
import pytest
import torch

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


def test_args_say_one_where_every_layer_has_experts_as_megatrons_own_do(tmp_path):
    tiny.write(tmp_path, "mixtral")
    assert tiny.payload_of(tmp_path, "mp_rank_00")["args"].moe_layer_freq == 1


def test_files_that_megatron_does_not_write_for_uncut_experts_may_be_missing(tmp_path):
    """With experts uncut Megatron writes one file per expert-parallel rank: here tp rank 0 has ep rank 0, 1 has 1."""
    written = tiny.write(tmp_path, "mixtral", tp=2, ep=2, etp=1)
    for name in ("mp_rank_00_001", "mp_rank_01_000"):
        shutil.rmtree(tmp_path / "release" / name)
    tiny.check_equal(tiny.open_it(tmp_path, "mixtral"), written, "mixtral")
    shutil.rmtree(tmp_path / "release" / "mp_rank_01_001")
    with pytest.raises(FileNotFoundError, match=r"mp_rank_00_001 does not exist"):
        tiny.open_it(tmp_path, "mixtral")


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
