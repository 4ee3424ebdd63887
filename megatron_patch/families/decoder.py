"""Keys and rules that decoder families share."""

from collections.abc import Callable
from typing import Any

from megatron_patch.config.model import ModelConfig
from megatron_patch.families.family import Key, Rule

LAYER, HF_LAYER = "decoder.layers.{l}.", "model.layers.{l}."
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")

# Defaults are those of transformers' configuration classes, where they are common to the families.
DENSE_KEYS = {
    "num_layers": Key(("num_hidden_layers",), is_shape=True),
    "hidden_size": Key(("hidden_size",), is_shape=True),
    "ffn_hidden_size": Key(("intermediate_size",), is_shape=True),
    "num_attention_heads": Key(("num_attention_heads",), is_shape=True),
    "num_query_groups": Key(("num_key_value_heads",), of_config=lambda hf: hf["num_attention_heads"], is_shape=True),
    "kv_channels": Key(
        ("head_dim",), of_config=lambda hf: hf["hidden_size"] // hf["num_attention_heads"], is_shape=True
    ),
    "vocab_size": Key(("vocab_size",)),
    "max_position_embeddings": Key(("max_position_embeddings",)),
    "norm_epsilon": Key(("rms_norm_eps",), 1e-6),
    "rotary_base": Key(("rope_theta", "rope_parameters.rope_theta", "rope_scaling.rope_theta"), 10000.0),
    "share_embeddings_and_output_weights": Key(("tie_word_embeddings",), False),
}


def balance_coefficient(name: str) -> Key:
    """The weight of the load balancing loss, 0 in a file that switches it off; `model/auxiliary.py` has its meaning."""
    return Key(
        (name,), 0.001, write=lambda c: 0.0 if c.moe_router_load_balancing_type == "none" else c.moe_aux_loss_coeff
    )


BALANCED_PER_BATCH = {
    "moe_router_load_balancing_type": Key((), "aux_loss"),
    "moe_aux_loss_coeff": balance_coefficient("router_aux_loss_coef"),
}

DENSE_EXPECTS = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "partial_rotary_factor": (1, 1.0),
}


ROPE_TYPE = (
    "rope_scaling.rope_type",
    "rope_scaling.type",
    "rope_parameters.rope_type",
    "rope_parameters.type",
)


def _scaling(name: str, default: float | None, *rope_types: str) -> Key:
    return Key((f"rope_scaling.{name}", f"rope_parameters.{name}"), default, only_when=("rope_type", rope_types))


# Rotary frequencies that depend on how far the context was stretched; a file's own type says which of these it uses.
ROTARY_KEYS = {
    "rope_type": Key(ROPE_TYPE, "default", write=lambda c: None if c.rope_type == "default" else c.rope_type),
    "rotary_scaling_factor": _scaling("factor", None, "llama3", "yarn"),
    "original_max_position_embeddings": _scaling("original_max_position_embeddings", None, "llama3", "yarn"),
    "low_freq_factor": _scaling("low_freq_factor", None, "llama3"),
    "high_freq_factor": _scaling("high_freq_factor", None, "llama3"),
    "beta_fast": _scaling("beta_fast", 32.0, "yarn"),
    "beta_slow": _scaling("beta_slow", 1.0, "yarn"),
    "mscale": _scaling("mscale", 0.0, "yarn"),
    "mscale_all_dim": _scaling("mscale_all_dim", 0.0, "yarn"),
}


def rope_types(*supported: str) -> dict[str, tuple[Any, ...]]:
    """What a family expects of the rotary scaling in any spelling."""
    expects: dict[str, tuple[Any, ...]] = dict.fromkeys(ROPE_TYPE, supported)
    for table in ("rope_scaling", "rope_parameters"):
        expects |= {
            f"{table}.partial_rotary_factor": (1, 1.0),
            f"{table}.attention_factor": (None,),
            f"{table}.truncate": (True,),
        }
    return expects


def embeddings(config: ModelConfig) -> list[Rule]:
    """Embedding, final norm, and the output layer unless it is the embedding."""
    rules = [
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _vocabulary_rows, shard="vocab"),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), _hidden),
    ]
    if not config.share_embeddings_and_output_weights:
        rules.append(Rule("output_layer.weight", ("lm_head.weight",), _vocabulary_rows, shard="vocab"))
    return rules


def grouped_query_attention(config: ModelConfig) -> list[Rule]:
    """Pre-norm, fused QKV (per query group: its query heads, its key, its value) and output projection."""
    mcore, hf = LAYER + "self_attention.", HF_LAYER + "self_attn."
    norm = Rule(mcore + "linear_qkv.layer_norm_weight", (HF_LAYER + "input_layernorm.weight",), _hidden)
    qkv = Rule(
        mcore + "linear_qkv.weight",
        tuple(f"{hf}{part}_proj.weight" for part in "qkv"),
        lambda c: (_qkv_rows(c), c.hidden_size),
        "qkv",
        "column",
    )
    bias = Rule(
        mcore + "linear_qkv.bias",
        tuple(f"{hf}{part}_proj.bias" for part in "qkv"),
        lambda c: (_qkv_rows(c),),
        "qkv",
        "column",
    )
    projection = Rule(
        mcore + "linear_proj.weight",
        (hf + "o_proj.weight",),
        lambda c: (c.hidden_size, c.num_attention_heads * c.kv_channels),
        shard="row",
    )
    return [norm, qkv, *([bias] if config.add_qkv_bias else []), projection]


def latent_attention(config: ModelConfig) -> list[Rule]:
    """Multi-head latent attention: queries, keys and values through low-rank projections (arXiv:2405.04434).

    The down projections are whole on every rank: the norm between down and up needs the full latent.
    """
    mcore, hf = LAYER + "self_attention.", HF_LAYER + "self_attn."

    def query_rows(c: ModelConfig) -> int:
        return c.num_attention_heads * (c.qk_head_dim + c.qk_pos_emb_head_dim)

    whole = [
        Rule(
            mcore + "linear_q_proj.weight",
            (hf + "q_proj.weight",),
            lambda c: (query_rows(c), c.hidden_size),
            shard="column",
        )
    ]
    compressed = [
        Rule(mcore + "linear_q_down_proj.weight", (hf + "q_a_proj.weight",), lambda c: (c.q_lora_rank, c.hidden_size)),
        Rule(mcore + "linear_q_up_proj.layer_norm_weight", (hf + "q_a_layernorm.weight",), lambda c: (c.q_lora_rank,)),
        Rule(
            mcore + "linear_q_up_proj.weight",
            (hf + "q_b_proj.weight",),
            lambda c: (query_rows(c), c.q_lora_rank),
            shard="column",
        ),
    ]
    return [
        Rule(LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",), _hidden),
        *(whole if config.q_lora_rank is None else compressed),
        Rule(
            mcore + "linear_kv_down_proj.weight",
            (hf + "kv_a_proj_with_mqa.weight",),
            lambda c: (c.kv_lora_rank + c.qk_pos_emb_head_dim, c.hidden_size),
        ),
        Rule(
            mcore + "linear_kv_up_proj.layer_norm_weight", (hf + "kv_a_layernorm.weight",), lambda c: (c.kv_lora_rank,)
        ),
        Rule(
            mcore + "linear_kv_up_proj.weight",
            (hf + "kv_b_proj.weight",),
            lambda c: (c.num_attention_heads * (c.qk_head_dim + c.v_head_dim), c.kv_lora_rank),
            shard="column",
        ),
        Rule(
            mcore + "linear_proj.weight",
            (hf + "o_proj.weight",),
            lambda c: (c.hidden_size, c.num_attention_heads * c.v_head_dim),
            shard="row",
        ),
    ]


def dense_mlp() -> list[Rule]:
    """Pre-norm and SwiGLU of the layers that have no experts."""
    norm = Rule(
        LAYER + "mlp.linear_fc1.layer_norm_weight",
        (HF_LAYER + "post_attention_layernorm.weight",),
        _hidden,
        layers="dense",
    )
    return [norm, *_swiglu("mlp.", "mlp.", lambda c: c.ffn_hidden_size, "dense")]


def routed_experts(hf: str = "mlp.", projections: tuple[str, str, str] = GATE_UP_DOWN) -> list[Rule]:
    """Pre-norm, router and one SwiGLU per routed expert; `projections` are HF's names of gate, up and down."""
    return [
        Rule(
            LAYER + "pre_mlp_layernorm.weight",
            (HF_LAYER + "post_attention_layernorm.weight",),
            _hidden,
            layers="moe",
        ),
        Rule(
            LAYER + "mlp.router.weight",
            (HF_LAYER + hf + "gate.weight",),
            lambda c: (c.num_moe_experts, c.hidden_size),
            layers="moe",
        ),
        *_swiglu(
            "mlp.experts.local_experts.{e}.",
            hf + "experts.{e}.",
            lambda c: c.moe_ffn_hidden_size,
            "moe",
            projections,
        ),
    ]


def shared_expert(config: ModelConfig, hf: str) -> list[Rule]:
    """The expert that every token passes, if there is one, and the gate that weights it, if it has one."""
    if config.moe_shared_expert_intermediate_size == 0:
        return []
    rules = _swiglu("mlp.shared_experts.", hf + ".", lambda c: c.moe_shared_expert_intermediate_size, "moe")
    if config.moe_shared_expert_gate:
        name = LAYER + "mlp.shared_experts.gate_weight"
        rules.append(Rule(name, (f"{HF_LAYER}{hf}_gate.weight",), lambda c: (1, c.hidden_size), layers="moe"))
    return rules


def _swiglu(
    mcore: str,
    hf: str,
    width: Callable[[ModelConfig], int],
    layers: str,
    projections: tuple[str, str, str] = GATE_UP_DOWN,
) -> list[Rule]:
    """Gate and up in one matrix, gate first, then down."""
    gate, up, down = (f"{HF_LAYER}{hf}{name}.weight" for name in projections)
    return [
        Rule(
            LAYER + mcore + "linear_fc1.weight",
            (gate, up),
            lambda c: (2 * width(c), c.hidden_size),
            "gate_up",
            "column",
            layers,
        ),
        Rule(
            LAYER + mcore + "linear_fc2.weight",
            (down,),
            lambda c: (c.hidden_size, width(c)),
            shard="row",
            layers=layers,
        ),
    ]


def _hidden(config: ModelConfig) -> tuple[int, ...]:
    return (config.hidden_size,)


def _qkv_rows(config: ModelConfig) -> int:
    return (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels


def _vocabulary_rows(config: ModelConfig) -> tuple[int, ...]:
    return (config.vocab_size, config.hidden_size)
