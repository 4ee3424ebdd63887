"""Families against the hub's own files and against transformers, which knows what an absent key means."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from megatron_patch.families import ALL
from megatron_patch.families.family import OPTIONAL
from megatron_patch.families.manifest import check_complete, manifest, parameter_count
from megatron_patch.families.resolve import from_checkpoint, preset, read_config

GOLDEN = Path(__file__).parents[1] / "golden"
V01, V03 = GOLDEN / "Mistral-7B-v0.1", GOLDEN / "Mistral-7B-v0.3"
MISTRAL = ALL["mistral"]


def published_shapes() -> dict[str, list[int]]:
    """Tensor name → shape of Mistral-7B-v0.1, all layers."""
    index = json.loads((V01 / "tensors.json").read_text())
    layers = range(index["layers"])
    return {name.format(l=layer): shape for name, shape in index["shapes"].items() for layer in layers}


def hf_shapes(config) -> dict[str, tuple[int, ...]]:
    """What the manifest says the Hugging Face tensors are: rows of an entry divided among its parts."""
    q, k = config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels
    rows = {"copy": lambda entry: [entry.shape[0]], "qkv": lambda _: [q, k, k]}
    rows["gate_up"] = lambda entry: [entry.shape[0] // 2] * 2
    shapes = {}
    for entry in manifest(MISTRAL, config):
        parts = rows[entry.layout](entry)
        assert sum(parts) == entry.shape[0]
        shapes |= {name: (part, *entry.shape[1:]) for name, part in zip(entry.hf, parts, strict=True)}
    return shapes


def theirs(hf: dict) -> dict:
    """transformers' reading of `hf`, by our field names."""
    config = MistralConfig.from_dict(dict(hf))
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_epsilon": config.rms_norm_eps,
        "rotary_base": config.rope_parameters["rope_theta"],
        "window_size": config.sliding_window,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
    }


def test_seven_billion_parameters_are_exactly_these():
    assert parameter_count(MISTRAL, preset(("mistral",), "7B").config) == 7_241_732_096
    assert parameter_count(MISTRAL, MISTRAL.config(read_config(V03))) == 7_248_023_552


def test_the_manifest_is_the_hubs_index():
    index, shapes = json.loads((V01 / "tensors.json").read_text()), published_shapes()
    ours = hf_shapes(MISTRAL.config(read_config(V01)))
    assert len(shapes) == 291
    assert {name: list(shape) for name, shape in ours.items()} == shapes
    assert 2 * sum(math.prod(shape) for shape in shapes.values()) == index["total_size"]


def test_the_manifest_is_transformers_state_dict():
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig.from_dict(read_config(V03)))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert hf_shapes(MISTRAL.config(read_config(V03))) == expected


@pytest.mark.parametrize("directory", [V01, V03], ids=lambda path: path.name)
def test_a_real_config_is_read_as_transformers_reads_it(directory):
    hf = read_config(directory)
    ours = dataclasses.asdict(MISTRAL.config(hf))
    del ours["init_method_std"]  # ours alone: not in config.json
    assert ours == theirs(hf)


@pytest.mark.parametrize("field", MISTRAL.keys)
def test_an_absent_key_is_transformers_default_or_refused(field):
    hf = read_config(V01)
    for spelling in MISTRAL.keys[field].hf:
        hf.pop(spelling, None)
    if MISTRAL.keys[field].is_required:
        with pytest.raises(ValueError, match=f"{MISTRAL.keys[field].hf[0]} missing"):
            MISTRAL.config(hf)
    else:
        assert getattr(MISTRAL.config(hf), field) == theirs(hf)[field]


@pytest.mark.parametrize("field", MISTRAL.keys)
def test_an_explicit_null_never_becomes_a_setting(field):
    hf = read_config(V01) | {MISTRAL.keys[field].hf[0]: None}
    if field in OPTIONAL or field == "kv_channels":
        assert getattr(MISTRAL.config(hf), field) == theirs(hf)[field]
    else:
        with pytest.raises(ValueError, match=MISTRAL.keys[field].hf[0]):
            MISTRAL.config(hf)


def test_only_the_window_may_be_switched_off():
    assert set(OPTIONAL) == {"window_size"}


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_both_spellings_of_rope_theta_are_read(rope):
    hf = read_config(V01)
    del hf["rope_theta"]
    assert MISTRAL.config(hf | rope).rotary_base == theirs(hf | rope)["rotary_base"] == 5e5


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"hidden_size": "4096"},
        {"rms_norm_eps": [1e-5]},
        {"num_hidden_layers": 32.0},
        {"num_hidden_layers": True},
        {"num_attention_heads": 0, "head_dim": None},
        {"sliding_window": 0},
        {"tie_word_embeddings": 1},
        {"rms_norm_eps": True},
    ],
    ids=str,
)
def test_what_would_change_the_mathematics_or_is_of_another_kind_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        MISTRAL.config(read_config(V01) | change)


def test_a_written_config_is_read_back_by_both():
    config = MISTRAL.config(read_config(V03))
    hf = json.loads(json.dumps(MISTRAL.hf_config(config, "bfloat16")))
    assert MISTRAL.config(hf) == config
    assert theirs(hf) == theirs(read_config(V03))


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "holds list"),
        ('{"architectures": ["LlamaForCausalLM"]}', "'LlamaForCausalLM'"),
        ('{"architectures": 5}', r"architectures\[0\] is None"),
    ],
    ids=["cut", "deep", "list", "family", "number"],
)
def test_a_config_that_cannot_be_used_is_one_sentence(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_checkpoint(("mistral",), "auto", tmp_path)


def test_missing_and_unknown_tensors_are_named_and_old_buffers_are_not():
    names = list(published_shapes())
    check_complete(names, [*names, "model.layers.0.self_attn.rotary_emb.inv_freq"], "here")
    with pytest.raises(ValueError, match=r"1 missing \(lm_head.weight\); 1 unknown \(stray.weight\)"):
        check_complete(names, [name for name in names if name != "lm_head.weight"] + ["stray.weight"], "here")
