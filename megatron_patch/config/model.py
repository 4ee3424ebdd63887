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
    add_qkv_bias: bool = setting("bias of the QKV projection", False)
    init_method_std: float = setting("standard deviation of a random initialisation", 0.008)

    # Rotary scaling. `default` uses none of the rest.
    rope_type: str = setting("how rotary frequencies are scaled", "default", choices=("default", "llama3", "yarn"))
    rotary_interleaved: bool = setting("channel 2i turns with channel 2i + 1, not i with i + D/2", False)
    rotary_scaling_factor: float = setting("factor by which the context was stretched", 1.0)
    original_max_position_embeddings: int | None = setting("context before it was stretched", None)
    low_freq_factor: float = setting("llama3: wavelengths above original context / this are scaled in full", 1.0)
    high_freq_factor: float = setting("llama3: wavelengths below original context / this are not scaled", 4.0)
    beta_fast: float = setting("yarn: rotations over the original context above which a channel is kept", 32.0)
    beta_slow: float = setting("yarn: rotations below which a channel is interpolated in full", 1.0)
    mscale: float = setting("yarn: attention temperature of the rotated channels, 0: that of the paper", 0.0)
    mscale_all_dim: float = setting("yarn: attention temperature of all channels", 0.0)

    # Mixture of experts. num_moe_experts == 0: every layer is dense.
    num_moe_experts: int = setting("routed experts of a MoE layer", 0)
    moe_router_topk: int = setting("experts each token is sent to", 0)
    moe_ffn_hidden_size: int = setting("width of one routed expert", 0)
    moe_first_dense_layers: int = setting("leading layers that stay dense", 0)
    moe_shared_expert_intermediate_size: int = setting("width of the expert every token passes, 0: none", 0)
    moe_shared_expert_gate: bool = setting("the shared expert is weighted by a sigmoid of the token", False)
    moe_router_pre_softmax: bool = setting("softmax over all experts, then top-k and no renormalisation", False)
    moe_router_topk_scaling_factor: float = setting("multiplies the chosen experts' weights", 1.0)
    moe_router_num_groups: int = setting("groups the experts are limited by, 1: none", 1)
    moe_router_group_topk: int = setting("groups a token may choose experts from, best by their highest score", 1)
    moe_router_load_balancing_type: str = setting(
        "what keeps the load of the experts even: a loss per micro-batch, or per sequence",
        "none",
        choices=("none", "aux_loss", "seq_aux_loss"),
    )
    moe_aux_loss_coeff: float = setting("weight of the load balancing loss, which is 1 a layer at balance", 0.0)
    moe_z_loss_coeff: float = setting("weight of the router z-loss", 0.0)

    # Multi-head latent attention. kv_lora_rank == 0: grouped-query attention.
    q_lora_rank: int | None = setting("rank of the compressed query; absent: not compressed", None)
    kv_lora_rank: int = setting("rank of the compressed keys and values", 0)
    qk_head_dim: int = setting("channels of a head without position", 0)
    qk_pos_emb_head_dim: int = setting("rotated channels of a head", 0)
    v_head_dim: int = setting("value channels of a head", 0)

    @property
    def is_mla(self) -> bool:
        """Whether attention is multi-head latent (arXiv:2405.04434)."""
        return self.kv_lora_rank > 0

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer`, counted from 0, routes to experts."""
        return self.num_moe_experts > 0 and layer >= self.moe_first_dense_layers
