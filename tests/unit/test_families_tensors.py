"""Manifests against the hub's indexes, transformers' own files and the published totals."""

import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_patch.families import ALL
from megatron_patch.families.manifest import active_parameter_count, check_complete, manifest, parameter_count
from megatron_patch.families.resolve import by_architecture, read_config

GOLDEN = Path(__file__).parents[1] / "golden"
INDEXES = sorted(path.parent for path in GOLDEN.glob("*/tensors.json"))
SIZES = [(family, size) for family in ALL.values() for size in family.sizes]
TINY = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 10, "qk_rope_head_dim": 4, "v_head_dim": 6}
VARIANTS = {
    "mistral": [{"head_dim": 12}, {"tie_word_embeddings": True}],
    "mixtral": [{"num_local_experts": 3, "head_dim": 12}],
    "llama": [{"head_dim": 12}, {"tie_word_embeddings": True}],
    "qwen1_5": [{"tie_word_embeddings": True}, {"head_dim": 12}],
    "qwen1_5_moe": [
        {"num_experts": 3, "shared_expert_intermediate_size": 40},
        {"num_experts": 3, "shared_expert_intermediate_size": 40, "qkv_bias": False, "num_key_value_heads": 4},
    ],
    "deepseek_v2": [
        {"n_routed_experts": 3, "q_lora_rank": None, "first_k_dense_replace": 1, **LATENT},
        {"n_routed_experts": 4, "q_lora_rank": 12, "first_k_dense_replace": 0, "n_shared_experts": 1, **LATENT},
    ],
}


def named(directory_or_family):
    return getattr(directory_or_family, "name", directory_or_family)


def expanded(pattern: str) -> list[str]:
    """`a.{0-2}.b` → `a.0.b`, `a.1.b`, `a.2.b`."""
    head, *rest = re.split(r"\{(\d+)-(\d+)\}", pattern, maxsplit=1)
    if not rest:
        return [head]
    first, last, tail = rest
    return [f"{head}{number}{end}" for number in range(int(first), int(last) + 1) for end in expanded(tail)]


def hf_shapes(family, config) -> dict[str, tuple[int, ...]]:
    """What the manifest says the Hugging Face tensors are: rows of an entry divided among its parts."""
    q, k = config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels
    rows = {"copy": lambda entry: [entry.shape[0]], "qkv": lambda _: [q, k, k]}
    rows["gate_up"] = lambda entry: [entry.shape[0] // 2] * 2
    shapes = {}
    for entry in manifest(family, config):
        parts = rows[entry.layout](entry)
        assert sum(parts) == entry.shape[0]
        shapes |= {name: (part, *entry.shape[1:]) for name, part in zip(entry.hf, parts, strict=True)}
    return shapes


@pytest.mark.parametrize("directory", INDEXES, ids=named)
def test_the_manifest_is_the_hubs_index(directory):
    index = json.loads((directory / "tensors.json").read_text())
    published = {name: tuple(shape) for pattern, shape in index["shapes"].items() for name in expanded(pattern)}
    hf = read_config(directory)
    family = by_architecture(hf, tuple(ALL), directory)
    assert hf_shapes(family, family.config(hf)) == published
    assert len(published) == index["tensors"]
    assert 2 * sum(map(math.prod, published.values())) == index["total_size"]


@pytest.mark.parametrize(("name", "change"), [(name, change) for name in ALL for change in VARIANTS[name]], ids=str)
def test_the_manifest_is_what_transformers_writes(tmp_path, name, change):
    """Names on disk differ from the modules' since transformers 5 fuses experts, so a file is the witness."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    family = ALL[name]
    config = family.config(TINY | change)
    written = AutoConfig.for_model(**json.loads(json.dumps(family.hf_config(config, "float32"))))
    AutoModelForCausalLM.from_config(written).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
    assert hf_shapes(family, config) == found


@pytest.mark.parametrize(("family", "size"), SIZES, ids=named)
def test_a_size_has_exactly_transformers_parameters(family, size):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **family.sizes[size]))
    assert parameter_count(family, family.config(family.sizes[size])) == model.num_parameters()


@pytest.mark.parametrize(
    ("name", "size", "billions"),  # as the models' own cards say
    [
        ("mistral", "7B", 7.24),
        ("mixtral", "8x7B", 12.88),
        ("qwen1_5_moe", "A2.7B", 2.69),
        ("deepseek_v2", "A21B", 21.4),
    ],
)
def test_one_token_passes_through_the_chosen_experts_only(name, size, billions):
    family = ALL[name]
    active = active_parameter_count(family, family.config(family.sizes[size]))
    assert round(active / 1e9, len(str(billions).split(".")[1])) == billions


def test_entries_carry_global_layer_and_expert_and_dense_layers_have_none():
    family = ALL["deepseek_v2"]
    config = family.config(TINY | VARIANTS["deepseek_v2"][0])
    entries = {entry.mcore: entry for entry in manifest(family, config)}
    assert (entries["output_layer.weight"].layer, entries["output_layer.weight"].expert) == (None, None)
    last = entries["decoder.layers.2.mlp.experts.local_experts.2.linear_fc1.weight"]
    assert (last.layer, last.expert, last.shape, last.shard) == (2, 2, (48, 32), "column")
    assert last.hf == tuple(f"model.layers.2.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up"))
    assert entries["decoder.layers.2.mlp.shared_experts.linear_fc2.weight"].expert is None
    dense = {name.removeprefix("decoder.layers.0.") for name, entry in entries.items() if entry.layer == 0}
    assert dense == {
        "input_layernorm.weight",
        "self_attention.linear_q_proj.weight",
        "self_attention.linear_kv_down_proj.weight",
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        "self_attention.linear_kv_up_proj.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }


def test_every_name_of_a_manifest_is_its_own():
    for family, size in SIZES:
        entries = manifest(family, family.config(family.sizes[size]))
        assert len({entry.mcore for entry in entries}) == len(entries)


def test_missing_and_unknown_tensors_are_named_and_old_buffers_are_not():
    names = [
        name
        for pattern in json.loads((INDEXES[0] / "tensors.json").read_text())["shapes"]
        for name in expanded(pattern)
    ]
    check_complete(names, [*names, "model.layers.0.self_attn.rotary_emb.inv_freq"], "here")
    with pytest.raises(ValueError, match=r"1 missing \(lm_head.weight\); 1 unknown \(stray.weight\)"):
        check_complete(names, [name for name in names if name != "lm_head.weight"] + ["stray.weight"], "here")
