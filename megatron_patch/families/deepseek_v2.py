"""DeepSeek-V2: latent attention, a dense first layer, then routed and shared experts (arXiv:2405.04434)."""

from collections.abc import Mapping
from typing import Any

from megatron_patch.config.model import ModelConfig
from megatron_patch.families.decoder import (
    DENSE_EXPECTS,
    DENSE_KEYS,
    ROTARY_KEYS,
    balance_coefficient,
    dense_mlp,
    embeddings,
    latent_attention,
    rope_types,
    routed_experts,
    shared_expert,
)
from megatron_patch.families.family import Family, Key

EXPERT_WIDTH, VALUE_WIDTH = 1407, 128  # transformers' defaults
GROUPED = "group_limited_greedy"


def _of_groups(count: Any, hf: Mapping[str, Any]) -> Any:
    """Groups limit the choice of experts under one of the two methods only."""
    return count if hf.get("topk_method") == GROUPED else 1


def _groups(name: str) -> Key:
    return Key((name,), of_config=lambda hf: None if hf.get("topk_method") == GROUPED else 1, read=_of_groups)


def _topk_method(config: ModelConfig) -> dict[str, Any]:
    return {"topk_method": GROUPED if config.moe_router_num_groups > 1 else "greedy"}


YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
SHARED_BY_SIZES = {
    "vocab_size": 102400, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": YARN, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "aux_loss_alpha": 0.001, "seq_aux": True,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    keys=DENSE_KEYS
    | ROTARY_KEYS
    | {
        "kv_channels": Key((), of_config=lambda hf: hf.get("v_head_dim") or VALUE_WIDTH),  # no head has this one width
        "max_position_embeddings": Key(("max_position_embeddings",), 2048),
        "rotary_interleaved": Key((), True),
        "num_moe_experts": Key(("n_routed_experts",), 64, is_shape=True),
        "moe_router_topk": Key(("num_experts_per_tok",)),
        "moe_ffn_hidden_size": Key(("moe_intermediate_size",), EXPERT_WIDTH, is_shape=True),
        "moe_shared_expert_intermediate_size": Key(
            ("n_shared_experts",),
            2,
            is_shape=True,
            read=lambda count, hf: count * (hf.get("moe_intermediate_size") or EXPERT_WIDTH),
            write=lambda c: c.moe_shared_expert_intermediate_size // c.moe_ffn_hidden_size,
        ),
        "moe_first_dense_layers": Key(("first_k_dense_replace",), 0, is_shape=True),
        "moe_router_pre_softmax": Key((), True),
        "moe_router_topk_scaling_factor": Key(("routed_scaling_factor",), 1.0),
        "moe_router_num_groups": _groups("n_group"),
        "moe_router_group_topk": _groups("topk_group"),
        "moe_router_load_balancing_type": Key(
            ("seq_aux",),
            True,
            holds=bool,
            read=lambda per_sequence, hf: "seq_aux_loss" if per_sequence else "aux_loss",
            write=lambda c: c.moe_router_load_balancing_type == "seq_aux_loss",
        ),
        "moe_aux_loss_coeff": balance_coefficient("aux_loss_alpha"),
        "q_lora_rank": Key(("q_lora_rank",), 1536, is_shape=True),
        "kv_lora_rank": Key(("kv_lora_rank",), 512, is_shape=True),
        "qk_head_dim": Key(("qk_nope_head_dim",), 128, is_shape=True),
        "qk_pos_emb_head_dim": Key(("qk_rope_head_dim",), 64, is_shape=True),
        "v_head_dim": Key(("v_head_dim",), VALUE_WIDTH, is_shape=True),
    },
    expects=DENSE_EXPECTS
    | rope_types("default", "yarn")
    | {
        "moe_layer_freq": (1,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", GROUPED),
        "norm_topk_prob": (False,),
        "rms_norm_eps": (1e-6,),  # the norms of the latents have this epsilon whatever the file says
    },
    rules=lambda config: (
        embeddings(config)
        + latent_attention(config)
        + dense_mlp()
        + routed_experts()
        + shared_expert(config, "mlp.shared_experts")
    ),
    prompt_type="alpaca",
    extras=_topk_method,
    sizes={
        # https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite/blob/main/config.json
        "A2.4B": SHARED_BY_SIZES | {
            "num_hidden_layers": 27, "hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16,
            "n_routed_experts": 64, "moe_intermediate_size": 1408, "q_lora_rank": None,
            "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        },
        # https://huggingface.co/deepseek-ai/DeepSeek-V2/blob/main/config.json
        "A21B": SHARED_BY_SIZES | {
            "num_hidden_layers": 60, "hidden_size": 5120, "intermediate_size": 12288, "num_attention_heads": 128,
            "n_routed_experts": 160, "moe_intermediate_size": 1536, "q_lora_rank": 1536,
            "topk_method": GROUPED, "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0,
        },
    },
)  # fmt: skip
