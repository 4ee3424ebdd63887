"""LLaMA 1, 2 and 3: the plain decoder (arXiv:2302.13971, 2307.09288, 2407.21783)."""

from megatron_patch.families.decoder import (
    DENSE_EXPECTS,
    DENSE_KEYS,
    ROTARY_KEYS,
    dense_mlp,
    embeddings,
    grouped_query_attention,
    rope_types,
)
from megatron_patch.families.family import Family, Key

STRETCH = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    keys=DENSE_KEYS | ROTARY_KEYS | {"max_position_embeddings": Key(("max_position_embeddings",), 2048)},
    expects=DENSE_EXPECTS | rope_types("default", "llama3"),
    rules=lambda config: embeddings(config) + grouped_query_attention(config) + dense_mlp(),
    prompt_type="alpaca",
    # Unmarked sizes are LLaMA 2, or LLaMA 1 where only it has them.
    sizes={
        # https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json
        "7B": {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        },
        # https://huggingface.co/meta-llama/Llama-2-13b-hf/blob/main/config.json
        "13B": {
            "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824,
            "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        },
        # https://huggingface.co/meta-llama/Llama-2-70b-hf/blob/main/config.json
        "70B": {
            "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        },
        # https://huggingface.co/huggyllama/llama-7b/blob/main/config.json
        "llama1-7B": {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
            "num_attention_heads": 32, "vocab_size": 32000,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        },
        # https://huggingface.co/huggyllama/llama-13b/blob/main/config.json
        "llama1-13B": {
            "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824,
            "num_attention_heads": 40, "vocab_size": 32000,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        },
        # https://huggingface.co/huggyllama/llama-30b/blob/main/config.json
        "30B": {
            "num_hidden_layers": 60, "hidden_size": 6656, "intermediate_size": 17920,
            "num_attention_heads": 52, "vocab_size": 32000,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        },
        # https://huggingface.co/huggyllama/llama-65b/blob/main/config.json
        "65B": {
            "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 22016,
            "num_attention_heads": 64, "vocab_size": 32000,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        },
        # https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json
        "llama3-8B": {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        },
        # https://huggingface.co/meta-llama/Meta-Llama-3-70B/blob/main/config.json
        "llama3-70B": {
            "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        },
        # https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
        "llama3.1-8B": {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": STRETCH,
        },
        # https://huggingface.co/meta-llama/Llama-3.1-70B/blob/main/config.json
        "llama3.1-70B": {
            "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": STRETCH,
        },
    },
)  # fmt: skip
