"""How much arithmetic a sample takes: the matrix products of the model, whatever a run recomputes."""

from megatron_patch.config.model import ModelConfig
from megatron_patch.families.family import Family
from megatron_patch.families.manifest import EMBEDDING, manifest

TRAINING = 3  # a backward pass computes two products for each of the forward's


def training_flops(family: Family, config: ModelConfig, length: int) -> int:
    """Floating-point operations of one forward and backward pass over a sample of `length` tokens.

    Two for each weight that a token is multiplied by and two for each product of a query or an attention weight with
    what it may see, as PaLM counts them (arXiv:2204.02311, appendix B), but only half of a causal score matrix, or its
    band under a window. Looking up an embedding takes none.
    """
    return TRAINING * 2 * (length * _weights_per_token(family, config) + _attention_products(config, length))


def _weights_per_token(family: Family, config: ModelConfig) -> int:
    total = 0
    for entry in manifest(family, config):
        is_table = entry.mcore == EMBEDDING and not config.share_embeddings_and_output_weights
        is_chosen = entry.expert is None or entry.expert < config.moe_router_topk
        if len(entry.shape) == 2 and is_chosen and not is_table:
            total += entry.shape[0] * entry.shape[1]
    return total


def _attention_products(config: ModelConfig, length: int) -> int:
    """Products over all layers and heads: query with key, attention weight with value."""
    if config.is_mla:
        channels = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
    else:
        channels = 2 * config.kv_channels
    return config.num_layers * config.num_attention_heads * channels * _visible_pairs(length, config.window_size)


def _visible_pairs(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included."""
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach
