"""Mixtral: Mistral with routed experts in every layer, top-2, renormalised (arXiv:2401.04088)."""

from megatron_patch.families.decoder import (
    BALANCED_PER_BATCH,
    DENSE_EXPECTS,
    embeddings,
    grouped_query_attention,
    rope_types,
    routed_experts,
)
from megatron_patch.families.family import Family, Key
from megatron_patch.families.mistral import MISTRAL_KEYS

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    keys=MISTRAL_KEYS
    | BALANCED_PER_BATCH
    | {
        "norm_epsilon": Key(("rms_norm_eps",), 1e-5),
        "rotary_base": Key(MISTRAL_KEYS["rotary_base"].hf, 1e6),
        "window_size": Key(("sliding_window",), of_config=lambda hf: None),
        "num_moe_experts": Key(("num_local_experts",), 8, is_shape=True),
        "moe_router_topk": Key(("num_experts_per_tok",), 2),
        "moe_ffn_hidden_size": Key(("intermediate_size",), is_shape=True),
    },
    expects=DENSE_EXPECTS | rope_types("default") | {"router_jitter_noise": (0, 0.0)},
    rules=lambda config: (
        embeddings(config) + grouped_query_attention(config) + routed_experts("block_sparse_moe.", ("w1", "w3", "w2"))
    ),
    prompt_type="mistral",
    sizes={
        # https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json
        "8x7B": {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02,
        },
        # https://huggingface.co/mistralai/Mixtral-8x22B-v0.1/blob/main/config.json
        "8x22B": {
            "num_hidden_layers": 56, "hidden_size": 6144, "intermediate_size": 16384,
            "num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001,
        },
        # Half the experts of 8x7B, for training from scratch or from a dense model; nobody published these weights.
        "4x7B": {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02,
        },
    },
)  # fmt: skip
