"""What a decoder *is*: sizes and switches in Megatron-Core's vocabulary. No behaviour."""

from dataclasses import dataclass

from megatron_patch.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of one decoder. A family reads it from a Hugging Face `config.json`."""

    num_layers: int = setting("transformer layers")
    hidden_size: int = setting("width of the residual stream")
    ffn_hidden_size: int = setting("width of the gated MLP")
    num_attention_heads: int = setting("query heads")
    num_query_groups: int = setting("key/value heads; each serves num_attention_heads / num_query_groups query heads")
    kv_channels: int = setting("width of one attention head")
    vocab_size: int = setting("rows of the embedding, without tensor-parallel padding")
    max_position_embeddings: int = setting("longest sequence the model was made for")
    norm_epsilon: float = setting("RMSNorm epsilon", 1e-5)
    rotary_base: float = setting("base of the rotary frequencies (rope theta)", 10000.0)
    window_size: int | None = setting("sliding window in tokens, the query itself included; absent: full", None)
    share_embeddings_and_output_weights: bool = setting("the output layer reuses the embedding", False)
    init_method_std: float = setting("standard deviation of a random initialisation", 0.008)
