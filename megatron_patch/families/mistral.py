"""Mistral: a dense decoder with grouped-query attention and, in v0.1, a sliding window (arXiv:2310.06825)."""

from megatron_patch.families.decoder import (
    DENSE_EXPECTS,
    DENSE_KEYS,
    dense_mlp,
    embeddings,
    grouped_query_attention,
    rope_types,
)
from megatron_patch.families.family import Family, Key

MISTRAL_KEYS = DENSE_KEYS | {
    "num_query_groups": Key(("num_key_value_heads",), 8, is_shape=True),
    "max_position_embeddings": Key(("max_position_embeddings",), 131072),
    "window_size": Key(("sliding_window",), 4096),
}
MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    keys=MISTRAL_KEYS,
    expects=DENSE_EXPECTS | rope_types("default"),
    rules=lambda config: embeddings(config) + grouped_query_attention(config) + dense_mlp(),
    prompt_type="mistral",
    sizes={
        # https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json
        "7B": {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
        },
        # https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.2/blob/main/config.json
        "7B-v0.2": {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
        },
        # https://huggingface.co/mistralai/Mistral-7B-v0.3/blob/main/config.json
        "7B-v0.3": {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
        },
    },
)  # fmt: skip
