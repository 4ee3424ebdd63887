import dataclasses

import pytest
import torch

from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.verify import check_can_run, check_equal, check_logits

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 19,
    "max_position_embeddings": 64,
    "sliding_window": 4,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {
    "dense": ("mistral", {}),
    "tied": ("mistral", {"tie_word_embeddings": True}),
    "experts": ("mixtral", EXPERTS),
    "latent attention, shared experts, first layer dense": (
        "deepseek_v2",
        EXPERTS
        | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 8}
        | {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    ),
}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Every parameter random; `changed` ones are given."""

    changed: dict = dataclasses.field(default_factory=dict)

    def dtype_of(self, entry):
        return self.read(entry).dtype

    def read(self, entry):
        if entry.mcore in self.changed:
            return self.changed[entry.mcore]
        generator = torch.Generator().manual_seed(len(entry.mcore) + 1000 * (entry.layer or 0) + (entry.expert or 0))
        return torch.randn(entry.shape, generator=generator) / 4


def model(kind):
    name, keys = KINDS[kind]
    config = ALL[name].config(SMALL | keys)
    return config, manifest(ALL[name], config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_in_any_parameter_is_found_where_it_first_acts(kind):
    config, entries = model(kind)
    check_equal(entries, Drawn(), Drawn())
    check_logits(entries, config, Drawn(), Drawn(), 12)
    for entry in entries:
        other = Drawn({entry.mcore: Drawn().read(entry).flip(0) + 0.5})
        with pytest.raises(ValueError, match=rf"1 tensors differ from the source \({entry.mcore}\)"):
            check_equal(entries, Drawn(), other)
        with pytest.raises(ValueError, match=f"verification failed: {_stage(entry)} gives values"):
            check_logits(entries, config, Drawn(), other, 12)


def _stage(entry):
    if entry.layer is not None:
        return f"layer {entry.layer}"
    names = {"embedding": "the embedding", "decoder": "the final norm", "output_layer": "the logits"}
    return names[entry.mcore.partition(".")[0]]


@pytest.mark.parametrize(
    "value",
    [torch.zeros(32), torch.full((32,), -0.0).bfloat16(), torch.full((32,), float("nan"))],
    ids=["zero for minus zero", "another type", "NaN"],
)
def test_equal_means_every_bit(value):
    _, entries = model("dense")
    name = "decoder.final_layernorm.weight"
    minus_zero = Drawn({name: torch.full((32,), -0.0)})
    check_equal(entries, minus_zero, minus_zero)
    with pytest.raises(ValueError, match=name):
        check_equal(entries, minus_zero, Drawn({name: value}))


def test_the_same_nan_is_equal_but_has_no_logits():
    config, entries = model("dense")
    nan = Drawn({"decoder.final_layernorm.weight": torch.full((32,), float("nan"))})
    check_equal(entries, nan, nan)
    with pytest.raises(ValueError, match=r"the final norm gives values of up to nan"):
        check_logits(entries, config, nan, nan, 3)


def test_many_differences_are_counted_and_some_are_named():
    _, entries = model("dense")
    other = Drawn({entry.mcore: Drawn().read(entry) + 1 for entry in entries[:6]})
    with pytest.raises(ValueError, match=r"6 tensors differ from the source \(.*, .*, .*, .* and 2 more\)$"):
        check_equal(entries, Drawn(), other)


@pytest.mark.parametrize("width", [20, 18], ids=["no whole 16 bytes in bf16", "nor in float32"])
def test_experts_of_any_width_are_compared(width):
    config = ALL["mixtral"].config(SMALL | {"num_local_experts": 4, "intermediate_size": width})
    entries = manifest(ALL["mixtral"], config)
    rounded = Drawn({entry.mcore: Drawn().read(entry).bfloat16() for entry in entries})
    check_can_run(config, 12)
    check_logits(entries, config, rounded, rounded, 12)


def test_more_tokens_than_the_model_has_positions_are_refused():
    with pytest.raises(ValueError, match=r"logits of 65 tokens cannot be compared: max_position_embeddings is 64"):
        check_can_run(model("dense")[0], 65)
