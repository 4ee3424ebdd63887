"""The names that a classic checkpoint may use, present and former."""

import layouts_of_mcore as tiny
import pytest
import torch


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
    source = tiny.open_it(tmp_path, "mixtral")
    assert source.layout["experts"] == "grouped"
    tiny.check_equal(source, written, "mixtral")


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
