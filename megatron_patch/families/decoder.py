"""Keys and rules that decoder families share."""

from megatron_patch.config.model import ModelConfig
from megatron_patch.families.family import Key, Rule

LAYER, HF_LAYER = "decoder.layers.{l}.", "model.layers.{l}."

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
    "rotary_base": Key(("rope_theta", "rope_parameters.rope_theta"), 10000.0),
    "share_embeddings_and_output_weights": Key(("tie_word_embeddings",), False),
}

DENSE_EXPECTS = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "rope_scaling.type": ("default",),
    "rope_scaling.rope_type": ("default",),
    "rope_parameters.rope_type": ("default",),
}


def embeddings(config: ModelConfig) -> list[Rule]:
    """Embedding, final norm, and the output layer unless it is the embedding."""
    rules = [
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _vocabulary_rows, shard="vocab"),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), _hidden),
    ]
    if not config.share_embeddings_and_output_weights:
        rules.append(Rule("output_layer.weight", ("lm_head.weight",), _vocabulary_rows, shard="vocab"))
    return rules


def grouped_query_attention() -> list[Rule]:
    """Pre-norm, fused QKV (per query group: its query heads, its key, its value) and output projection."""
    mcore, hf = LAYER + "self_attention.", HF_LAYER + "self_attn."
    return [
        Rule(mcore + "linear_qkv.layer_norm_weight", (HF_LAYER + "input_layernorm.weight",), _hidden),
        Rule(
            mcore + "linear_qkv.weight",
            (hf + "q_proj.weight", hf + "k_proj.weight", hf + "v_proj.weight"),
            lambda c: ((c.num_attention_heads + 2 * c.num_query_groups) * c.kv_channels, c.hidden_size),
            "qkv",
            "column",
        ),
        Rule(
            mcore + "linear_proj.weight",
            (hf + "o_proj.weight",),
            lambda c: (c.hidden_size, c.num_attention_heads * c.kv_channels),
            shard="row",
        ),
    ]


def gated_mlp() -> list[Rule]:
    """Pre-norm and SwiGLU: gate and up in one matrix, gate first."""
    mcore, hf = LAYER + "mlp.", HF_LAYER + "mlp."
    return [
        Rule(mcore + "linear_fc1.layer_norm_weight", (HF_LAYER + "post_attention_layernorm.weight",), _hidden),
        Rule(
            mcore + "linear_fc1.weight",
            (hf + "gate_proj.weight", hf + "up_proj.weight"),
            lambda c: (2 * c.ffn_hidden_size, c.hidden_size),
            "gate_up",
            "column",
        ),
        Rule(
            mcore + "linear_fc2.weight",
            (hf + "down_proj.weight",),
            lambda c: (c.hidden_size, c.ffn_hidden_size),
            shard="row",
        ),
    ]


def _hidden(config: ModelConfig) -> tuple[int, ...]:
    return (config.hidden_size,)


def _vocabulary_rows(config: ModelConfig) -> tuple[int, ...]:
    return (config.vocab_size, config.hidden_size)
