"""Every family's model against transformers': the same weights, read from disk, give the same logits and gradients."""

import pytest
import torch
from beside_transformers import VOCABULARY, YARN, our_gradients, ours, peer, peer_gradients

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
ROUNDING = 1e-8  # a gradient that is zero in theory: the router's when each token has one expert of weight 1
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
VARIANTS = {
    "mistral": {
        "full attention": {},
        "sliding window": {"sliding_window": 5},
        "window one shorter than the sequence": {"sliding_window": 20},
        "window as long as the sequence": {"sliding_window": 21},
        "head_dim is not hidden / heads": {"head_dim": 24},
        "every head its own key": {"num_key_value_heads": 4},
        "one key for all heads": {"num_key_value_heads": 1},
        "tied embeddings": {"tie_word_embeddings": True},
        "another rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    },
    "llama": {
        "grouped queries": {},
        "every head its own key": {"num_key_value_heads": 4},
        "tied embeddings": {"tie_word_embeddings": True},
        "stretched rotary frequencies": {"rope_parameters": LLAMA3},
    },
    "qwen1_5": {
        "bias": {},
        "bias, every head its own key": {"num_key_value_heads": 4},
        "bias, tied embeddings": {"tie_word_embeddings": True},
    },
    "mixtral": {
        "two of eight experts": {},
        "one expert": {"num_experts_per_tok": 1},
        "all experts": {"num_local_experts": 4, "num_experts_per_tok": 4},
        "more experts than tokens reach": {"num_local_experts": 40},
        "sliding window": {"sliding_window": 5},
        "head_dim is not hidden / heads": {"head_dim": 24},
        "tied embeddings": {"tie_word_embeddings": True},
    },
    "qwen1_5_moe": {
        "gated shared expert": {},
        "renormalised weights": {"norm_topk_prob": True},
        "no bias": {"qkv_bias": False},
        "tied embeddings": {"tie_word_embeddings": True},
    },
    "deepseek_v2": {
        "yarn, first layer dense": {},
        "compressed queries": {"q_lora_rank": 24},
        "groups limit the choice": GROUPS,
        "groups, compressed queries, scaled weights": GROUPS | {"q_lora_rank": 24, "routed_scaling_factor": 16.0},
        "scaled weights": {"routed_scaling_factor": 2.5},
        "no dense layer": {"first_k_dense_replace": 0},
        "two dense layers": {"first_k_dense_replace": 2},
        "narrow values": {"v_head_dim": 8},
        "values wider than keys": {"v_head_dim": 40},
        "plain rotary frequencies": {"rope_parameters": PLAIN_ROPE},
        "yarn of another temperature": {"rope_parameters": YARN | {"mscale": 1.3}},
        "yarn, all temperature in the rotation": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}},
        "yarn without a temperature of its own": {"rope_parameters": {**YARN, "mscale": None}},
        "yarn, more channels interpolated than there are": {
            "rope_parameters": YARN | {"rope_theta": 10.0, "beta_slow": 0.01}
        },
        "tied embeddings": {"tie_word_embeddings": True},
    },
}
CASES = [
    pytest.param(family, options, id=f"{family}: {name}")
    for family, variants in VARIANTS.items()
    for name, options in variants.items()
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_logits_and_gradients_are_those_of_transformers(tmp_path, family, options):
    torch.set_num_threads(1)
    theirs = peer(family, **options)
    theirs.save_pretrained(tmp_path / "weights")
    model = ours(tmp_path / "weights", family)
    tokens = torch.randint(0, VOCABULARY, (3, 22))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    reference = theirs(inputs).logits
    assert (model(inputs) - reference).abs().max() <= 1e-5 * reference.abs().max()

    torch.nn.functional.cross_entropy(reference.flatten(0, 1), labels.flatten()).backward()
    model(inputs, labels).mean().backward()
    found = our_gradients(model)
    for name, wanted in peer_gradients(theirs, tmp_path / "gradients", family):
        error, largest = (found.pop(name) - wanted).abs().max().item(), wanted.abs().max().item()
        assert error <= 1e-5 * largest + ROUNDING, f"{name}: {error:.1e} of {largest:.1e}"
    assert not found
