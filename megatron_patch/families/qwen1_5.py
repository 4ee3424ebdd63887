"""Qwen1.5: LLaMA with a bias on queries, keys and values; the MoE adds a gated shared expert (arXiv:2309.16609)."""

from megatron_patch.families.decoder import (
    BALANCED_PER_BATCH,
    DENSE_EXPECTS,
    DENSE_KEYS,
    dense_mlp,
    embeddings,
    grouped_query_attention,
    rope_types,
    routed_experts,
    shared_expert,
)
from megatron_patch.families.family import Family, Key

KEYS = DENSE_KEYS | {"max_position_embeddings": Key(("max_position_embeddings",), 32768)}
EXPECTS = (
    DENSE_EXPECTS
    | rope_types("default")
    | {
        "use_sliding_window": (False,),
        "layer_types": ("full_attention",),
    }
)
SHARED_BY_SIZES = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 151936}

QWEN1_5 = Family(
    name="qwen1_5",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    keys=KEYS | {
        "num_query_groups": Key(("num_key_value_heads",), 32, lambda hf: hf["num_attention_heads"], is_shape=True),
        "add_qkv_bias": Key((), True),
    },
    expects=EXPECTS,
    rules=lambda config: embeddings(config) + grouped_query_attention(config) + dense_mlp(),
    prompt_type="alpaca",
    sizes={
        # https://huggingface.co/Qwen/Qwen1.5-0.5B/blob/main/config.json
        "0.5B": SHARED_BY_SIZES | {
            "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 2816,
            "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True,
        },
        # https://huggingface.co/Qwen/Qwen1.5-1.8B/blob/main/config.json
        "1.8B": SHARED_BY_SIZES | {
            "num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5504,
            "num_attention_heads": 16, "num_key_value_heads": 16,
        },
        # https://huggingface.co/Qwen/Qwen1.5-4B/blob/main/config.json
        "4B": SHARED_BY_SIZES | {
            "num_hidden_layers": 40, "hidden_size": 2560, "intermediate_size": 6912,
            "num_attention_heads": 20, "num_key_value_heads": 20, "rope_theta": 5e6,
        },
        # https://huggingface.co/Qwen/Qwen1.5-7B/blob/main/config.json
        "7B": SHARED_BY_SIZES | {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
            "num_attention_heads": 32, "num_key_value_heads": 32,
        },
        # https://huggingface.co/Qwen/Qwen1.5-14B/blob/main/config.json
        "14B": SHARED_BY_SIZES | {
            "vocab_size": 152064,
            "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13696,
            "num_attention_heads": 40, "num_key_value_heads": 40,
        },
        # https://huggingface.co/Qwen/Qwen1.5-32B/blob/main/config.json
        "32B": SHARED_BY_SIZES | {
            "vocab_size": 152064,
            "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 27392,
            "num_attention_heads": 40, "num_key_value_heads": 8,
        },
        # https://huggingface.co/Qwen/Qwen1.5-72B/blob/main/config.json
        "72B": SHARED_BY_SIZES | {
            "vocab_size": 152064,
            "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 24576,
            "num_attention_heads": 64, "num_key_value_heads": 64,
        },
    },
)  # fmt: skip

QWEN1_5_MOE = Family(
    name="qwen1_5_moe",
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    keys=KEYS | BALANCED_PER_BATCH | {
        "num_query_groups": Key(("num_key_value_heads",), 16, is_shape=True),
        "add_qkv_bias": Key(("qkv_bias",), True),
        "num_moe_experts": Key(("num_experts",), 60, is_shape=True),
        "moe_router_topk": Key(("num_experts_per_tok",), 4),
        "moe_ffn_hidden_size": Key(("moe_intermediate_size",), 1408, is_shape=True),
        "moe_shared_expert_intermediate_size": Key(("shared_expert_intermediate_size",), 5632, is_shape=True),
        # A dense model's MLP becomes experts without a shared one beside them, and then there is nothing to weigh.
        "moe_shared_expert_gate": Key((), of_config=lambda hf: hf.get("shared_expert_intermediate_size") != 0),
        # Softmax, top-k, renormalise is top-k, softmax: what Megatron-Core does without pre_softmax.
        "moe_router_pre_softmax": Key(
            ("norm_topk_prob",), False, read=lambda value, hf: not value, write=lambda c: not c.moe_router_pre_softmax
        ),
    },
    expects=EXPECTS | {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    rules=lambda config: (
        embeddings(config)
        + grouped_query_attention(config)
        + routed_experts()
        + shared_expert(config, "mlp.shared_expert")
    ),
    prompt_type="alpaca",
    sizes={
        # https://huggingface.co/Qwen/Qwen1.5-MoE-A2.7B/blob/main/config.json
        "A2.7B": SHARED_BY_SIZES | {
            "num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16,
            "num_key_value_heads": 16, "max_position_embeddings": 8192,
            "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "norm_topk_prob": False, "router_aux_loss_coef": 0.001,
        },
    },
)  # fmt: skip
