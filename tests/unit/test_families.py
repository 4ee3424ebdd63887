"""Architectures read from `config.json` against transformers, which knows what an absent key means."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from megatron_patch.families import ALL
from megatron_patch.families.family import OPTIONAL
from megatron_patch.families.manifest import manifest
from megatron_patch.families.resolve import by_architecture, from_checkpoint, preset, read_config

GOLDEN = Path(__file__).parents[1] / "golden"
V01, V03 = GOLDEN / "Mistral-7B-v0.1", GOLDEN / "Mistral-7B-v0.3"
MISTRAL = ALL["mistral"]
CHECKPOINTS = sorted(path.parent for path in GOLDEN.glob("*/config.json"))
RICHEST = {  # the golden file of each family that uses most keys
    "mistral": "Mistral-7B-v0.1",
    "mixtral": "Mixtral-8x7B-v0.1",
    "llama": "Llama-3.1-8B",
    "qwen1_5": "Qwen1.5-0.5B",
    "qwen1_5_moe": "Qwen1.5-MoE-A2.7B-Chat",
    "deepseek_v2": "DeepSeek-V2",
}
UNSTORED = {  # by transformers, when absent; the last two are those of DeepSeek's own configuration class
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "moe_aux_loss_coeff": 0.001,
    "moe_router_load_balancing_type": "seq_aux_loss",
}
SIZES = [(family, size) for family in ALL.values() for size in family.sizes]


def named(thing):
    return getattr(thing, "name", thing)


def golden(name: str) -> dict:
    return read_config(GOLDEN / RICHEST[name])


def spelled_fields() -> list[tuple[str, str]]:
    """(family, field) of every setting that the golden file of the family can spell."""
    configs = {name: vars(ALL[name].config(golden(name))) for name in ALL}
    return [(name, f) for name in ALL for f, key in ALL[name].keys.items() if key.hf and key.is_used(configs[name])]


def theirs(hf: dict) -> dict:
    """transformers' reading of `hf`, by our field names; fields its configuration does not have are absent."""
    hf = copy.deepcopy(hf)
    config = AutoConfig.for_model(hf.pop("model_type"), **hf)
    rope, kind = config.rope_parameters, config.model_type
    heads = config.num_attention_heads
    is_grouped = getattr(config, "topk_method", None) == "group_limited_greedy"
    values = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_epsilon": config.rms_norm_eps,
        "rotary_base": rope["rope_theta"],
        "window_size": getattr(config, "sliding_window", None) or None,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        "add_qkv_bias": getattr(config, "qkv_bias", kind == "qwen2"),
        "rope_type": rope["rope_type"],
        "moe_router_pre_softmax": kind == "deepseek_v2" or (kind == "qwen2_moe" and not config.norm_topk_prob),
        "moe_router_num_groups": config.n_group if is_grouped else 1,
        "moe_router_group_topk": config.topk_group if is_grouped else 1,
    }
    spelled = {
        "moe_router_topk": "num_experts_per_tok",
        "num_moe_experts": "num_experts",
        "moe_ffn_hidden_size": "intermediate_size" if kind == "mixtral" else "moe_intermediate_size",
        "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
        "moe_first_dense_layers": "first_k_dense_replace",
        "moe_router_topk_scaling_factor": "routed_scaling_factor",
        "moe_aux_loss_coeff": "aux_loss_alpha" if kind == "deepseek_v2" else "router_aux_loss_coef",
        "q_lora_rank": "q_lora_rank",
        "kv_lora_rank": "kv_lora_rank",
        "qk_head_dim": "qk_nope_head_dim",
        "qk_pos_emb_head_dim": "qk_rope_head_dim",
        "v_head_dim": "v_head_dim",
    }
    values |= {ours: getattr(config, name) for ours, name in spelled.items() if hasattr(config, name)}
    if kind == "deepseek_v2":
        values["moe_shared_expert_intermediate_size"] = config.n_shared_experts * config.moe_intermediate_size
        values["kv_channels"] = config.v_head_dim
    in_table = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", *UNSTORED)
    values |= {name: rope[name] for name in in_table if name in rope}
    return values | ({"rotary_scaling_factor": rope["factor"]} if "factor" in rope else {})


def differences(config, expected: dict) -> dict:
    """Fields that both know and read differently."""
    ours = dataclasses.asdict(config)
    return {field: (ours[field], value) for field, value in expected.items() if ours[field] != value}


def without(hf: dict, name: str) -> None:
    *path, last = name.split(".")
    for part in path:
        hf = hf.get(part) or {}
    hf.pop(last, None)


def placed(hf: dict, name: str, value) -> dict:
    hf = copy.deepcopy(hf)
    *path, last = name.split(".")
    table = hf
    for part in path:
        table = table.setdefault(part, {})
    table[last] = value
    return hf


@pytest.mark.parametrize("directory", CHECKPOINTS, ids=named)
def test_a_real_config_is_read_as_transformers_reads_it(directory):
    hf = read_config(directory)
    assert differences(by_architecture(hf, tuple(ALL), directory).config(hf), theirs(hf)) == {}


@pytest.mark.parametrize(("family", "size"), SIZES, ids=named)
def test_a_written_config_is_read_back_by_both(family, size):
    config = family.config(family.sizes[size])
    hf = json.loads(json.dumps(family.hf_config(config, "bfloat16")))
    assert family.config(hf) == config
    assert by_architecture(hf, tuple(ALL), "here") is family
    assert differences(config, theirs(hf)) == {}


@pytest.mark.parametrize("family", ALL.values(), ids=named)
def test_a_config_that_transformers_writes_is_read_as_the_original(family, tmp_path):
    hf = golden(family.name)
    AutoConfig.for_model(**copy.deepcopy(hf)).save_pretrained(tmp_path)
    written = read_config(tmp_path)
    assert "rope_parameters" in written
    assert family.config(written) == family.config(hf)


@pytest.mark.parametrize(("name", "field"), spelled_fields())
def test_an_absent_key_is_transformers_default_or_refused(name, field):
    hf, family = golden(name), ALL[name]
    for spelling in family.keys[field].hf:
        without(hf, spelling)
    if family.keys[field].is_required or field in ("moe_router_num_groups", "moe_router_group_topk"):
        with pytest.raises(ValueError, match=f"{family.keys[field].hf[0]}.* missing or null"):
            family.config(hf)
    else:
        assert getattr(family.config(hf), field) == theirs(hf).get(field, UNSTORED.get(field))


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, field in spelled_fields() if "." not in ALL[name].keys[field].hf[0]]
)
def test_an_explicit_null_is_what_transformers_makes_of_it_or_refused(name, field):
    spelling = ALL[name].keys[field].hf[0]
    hf = golden(name) | {spelling: None}
    is_strict = field == "num_query_groups" and name in ("mistral", "mixtral", "qwen1_5_moe")
    if field in OPTIONAL or (field in ("num_query_groups", "kv_channels") and not is_strict):
        assert getattr(ALL[name].config(hf), field) == theirs(hf)[field]
    else:
        with pytest.raises(ValueError, match=f"{spelling}.* null"):
            ALL[name].config(hf)


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_both_spellings_of_rope_theta_are_read(rope):
    hf = read_config(V01)
    del hf["rope_theta"]
    assert MISTRAL.config(hf | rope).rotary_base == theirs(hf | rope)["rotary_base"] == 5e5


def test_one_number_spelled_twice_is_one_setting():
    hf = golden("deepseek_v2") | {"rope_parameters": {"rope_theta": 10000.0, "type": "yarn"}}
    assert ALL["deepseek_v2"].config(hf) == ALL["deepseek_v2"].config(golden("deepseek_v2"))


@pytest.mark.parametrize("table", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_every_spelling_of_a_stretched_context_is_the_same(table, kind):
    hf = golden("llama")
    scaling = hf.pop("rope_scaling")
    respelled = hf | {table: {kind: scaling.pop("rope_type"), **scaling}}
    assert ALL["llama"].config(respelled) == ALL["llama"].config(golden("llama"))


def test_spellings_that_disagree_are_refused():
    hf = golden("llama") | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(ValueError, match=r"rope_theta is 500000.0 and rope_parameters.rope_theta is 10000.0"):
        ALL["llama"].config(hf)
    hf = golden("llama") | {"rope_parameters": {"rope_type": "default"}}
    with pytest.raises(ValueError, match=r"rope_scaling.rope_type is 'llama3' and rope_parameters.rope_type is"):
        ALL["llama"].config(hf)


def test_a_context_that_is_not_stretched_reads_and_writes_no_stretching():
    hf = golden("llama")
    hf["rope_scaling"] |= {"rope_type": "default"}
    config = ALL["llama"].config(hf)
    assert (config.rope_type, config.rotary_scaling_factor) == ("default", 1.0)
    assert "rope_scaling" not in ALL["llama"].hf_config(config, "bfloat16")


def test_groups_limit_the_experts_only_under_the_method_that_says_so():
    config = ALL["deepseek_v2"].config(golden("deepseek_v2") | {"topk_method": "greedy"})
    assert (config.moe_router_num_groups, config.moe_router_group_topk) == (1, 1)
    assert ALL["deepseek_v2"].hf_config(config, "bfloat16")["topk_method"] == "greedy"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"hidden_act": "gelu"}),
        ("mistral", {"attention_bias": True}),
        ("mistral", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("mistral", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}),
        ("mistral", {"hidden_size": "4096"}),
        ("mistral", {"hidden_size": 4096.5}),
        ("mistral", {"num_hidden_layers": True}),
        ("mistral", {"num_hidden_layers": 32.0}),
        ("mistral", {"num_attention_heads": 0, "head_dim": None}),
        ("mistral", {"sliding_window": 0}),
        ("mistral", {"rms_norm_eps": True}),
        ("mistral", {"rms_norm_eps": [1e-5]}),
        ("mistral", {"tie_word_embeddings": 1}),
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        ("qwen1_5", {"use_sliding_window": True}),
        ("qwen1_5", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen1_5_moe", {"decoder_sparse_step": 2}),
        ("qwen1_5_moe", {"mlp_only_layers": [0]}),
        ("deepseek_v2", {"moe_layer_freq": 2}),
        ("deepseek_v2", {"scoring_func": "sigmoid"}),
        ("deepseek_v2", {"topk_method": "noaux_tc"}),
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}),
        ("deepseek_v2", {"rope_scaling": {"type": "yarn", "factor": 40, "attention_factor": 1.2}}),
    ],
    ids=str,
)
def test_what_would_change_the_mathematics_is_refused(name, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ALL[name].config(golden(name) | change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rope_theta": 0}, "rope_theta is 0; a finite number above 0 is needed"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; a finite number above 0 is needed"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; a finite number above 0 is needed"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648; a whole number from 1 to 2147483647 is needed"),
        ({"hidden_size": 10**4000}, r"hidden_size is 1000+…; a whole number"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; an object is needed"),
        ({"rope_scaling": "x"}, "rope_scaling is 'x'; an object is needed"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            r"rope_parameters.full_attention is .*; one setting for all",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config says .* quantised \('gptq'\)"),
        ({"compression_config": {"format": "pack"}}, r"compression_config says .* quantised \(None\)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_meant_is_refused_in_the_files_own_words(change, told):
    with pytest.raises(ValueError, match=rf"^config.json: {told}") as error:
        MISTRAL.config(golden("mistral") | change)
    assert len(str(error.value)) < 200


def test_a_null_table_and_an_empty_quantisation_say_nothing():
    changed = {"rope_scaling": None, "rope_parameters": {}, "quantization_config": {}, "compression_config": None}
    assert MISTRAL.config(golden("mistral") | changed) == MISTRAL.config(golden("mistral"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": 10**7}, "num_layers 10000000 and num_moe_experts 8 make up to 210,000,000 tensors"),
        ({"num_local_experts": 10**7}, "num_layers 32 and num_moe_experts 10000000 make up to 640,000,160 tensors"),
    ],
)
def test_an_architecture_of_absurd_size_is_refused_before_it_is_expanded(change, told):
    with pytest.raises(ValueError, match=f"{told}; at most 262,144 are supported"):
        manifest(ALL["mixtral"], ALL["mixtral"].config(golden("mixtral") | change))


def test_two_settings_of_one_key_are_not_written_as_one():
    config = dataclasses.replace(preset(("mixtral",), "8x7B").config, moe_ffn_hidden_size=3584)
    with pytest.raises(ValueError, match=r"one intermediate_size for settings that differ here: 14336 and 3584"):
        ALL["mixtral"].hf_config(config, "bfloat16")


def test_v03_under_the_name_7b_is_taken_with_warnings():
    resolved = from_checkpoint(("mistral",), "7B", V03)
    assert (resolved.config.rotary_base, resolved.config.window_size, resolved.config.vocab_size) == (1e6, None, 32768)
    assert [warning.split()[0] for warning in resolved.warnings] == ["vocab_size", "rope_theta", "sliding_window"]
    assert from_checkpoint(("mistral",), "auto", V03).warnings == ()


def test_a_shape_that_disagrees_names_key_and_both_values(tmp_path):
    hf = read_config(V01) | {"num_hidden_layers": 24, "intermediate_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(
        ValueError, match=r"num_hidden_layers is 24 in .* and 32 in MODEL_SIZE 7B; intermediate_size is"
    ):
        from_checkpoint(("mistral",), "7B", tmp_path)
    assert from_checkpoint(("mistral",), "auto", tmp_path).config.num_layers == 24


def test_a_difference_is_told_in_the_files_own_words(tmp_path):
    hf = golden("deepseek_v2") | {"n_shared_experts": 3, "v_head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=r"n_shared_experts is 3 in .* and 2 in MODEL_SIZE A21B; v_head_dim is 64"):
        from_checkpoint(("deepseek_v2",), "A21B", tmp_path)
    with pytest.raises(ValueError, match=r"n_routed_experts is 64 in .* and 160 in MODEL_SIZE A21B"):
        from_checkpoint(("deepseek_v2",), "A21B", GOLDEN / "DeepSeek-V2-Lite")


@pytest.mark.parametrize("directory", [path for path in CHECKPOINTS if path != V03], ids=named)
def test_a_published_checkpoint_is_its_size_without_a_warning(directory):
    family = by_architecture(read_config(directory), tuple(ALL), directory)
    config = family.config(read_config(directory))
    context = {"max_position_embeddings": config.max_position_embeddings}  # the chat model of one size has another
    assert any(dataclasses.replace(preset((family.name,), size).config, **context) == config for size in family.sizes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "holds list"),
        ('{"architectures": ["LlamaForCausalLM"]}', "'LlamaForCausalLM'"),
        ('{"architectures": 5}', r"architectures\[0\] is None"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "config.json holds a number of thousands of digits"),
    ],
    ids=["cut", "deep", "list", "family", "number", "digits"],
)
def test_a_config_that_cannot_be_used_is_one_sentence(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_checkpoint(("mistral",), "auto", tmp_path)
