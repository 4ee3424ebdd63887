"""A tiny model of each family, with what a layout could get wrong, and the global batch that they all train on."""

import dataclasses

import torch

from megatron_patch.config.model import ModelConfig
from megatron_patch.data.batches import Batch

# vocab_size is odd: a tensor-parallel rank holds a padding row. Sequences are longer than the window.
MISTRAL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=12,
    vocab_size=61,
    max_position_embeddings=64,
    window_size=7,
    init_method_std=0.2,
)
LLAMA = dataclasses.replace(
    MISTRAL,
    window_size=None,
    num_attention_heads=4,
    num_query_groups=2,
    rope_type="llama3",
    rotary_scaling_factor=4.0,
    original_max_position_embeddings=8,
)
QWEN = dataclasses.replace(MISTRAL, window_size=None, num_query_groups=8, kv_channels=4, add_qkv_bias=True)
MIXTRAL = dataclasses.replace(
    MISTRAL,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=48,
    moe_router_load_balancing_type="aux_loss",
    moe_aux_loss_coeff=0.2,
    moe_z_loss_coeff=0.1,
)
QWEN_MOE = dataclasses.replace(
    QWEN,
    num_moe_experts=8,
    moe_router_topk=3,
    moe_ffn_hidden_size=16,
    moe_shared_expert_intermediate_size=48,
    moe_shared_expert_gate=True,
    moe_router_pre_softmax=True,
)
# Latent attention, a dense layer, then experts in four groups of which two may be chosen from.
DEEPSEEK = dataclasses.replace(
    MISTRAL,
    window_size=None,
    num_attention_heads=4,
    num_query_groups=4,
    rotary_interleaved=True,
    rope_type="yarn",
    rotary_scaling_factor=4.0,
    original_max_position_embeddings=8,
    mscale=0.707,
    mscale_all_dim=0.707,
    num_moe_experts=8,
    moe_router_topk=3,
    moe_ffn_hidden_size=16,
    moe_first_dense_layers=1,
    moe_shared_expert_intermediate_size=32,
    moe_router_pre_softmax=True,
    moe_router_topk_scaling_factor=2.0,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    moe_router_load_balancing_type="seq_aux_loss",
    moe_aux_loss_coeff=0.3,
    q_lora_rank=12,
    kv_lora_rank=20,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=12,
)

# By the name a table shows; a family's own name is the part before the blank.
MODELS = {
    "mistral": MISTRAL,
    "llama": LLAMA,
    "qwen1_5": QWEN,
    "qwen1_5 tied": dataclasses.replace(QWEN, share_embeddings_and_output_weights=True),
    "mixtral": MIXTRAL,
    "qwen1_5_moe": QWEN_MOE,
    "qwen1_5_moe tied": dataclasses.replace(QWEN_MOE, share_embeddings_and_output_weights=True),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v2 lite": dataclasses.replace(
        DEEPSEEK, q_lora_rank=None, moe_router_num_groups=1, moe_router_group_topk=1
    ),
}

SAMPLES, LENGTH, MICRO_BATCH = 16, 16, 2


def global_batch(*, is_packed: bool = False) -> Batch:
    """Samples with different numbers of unmasked tokens, so that averaging per rank or micro-batch would be wrong.

    Packed samples hold one to four documents, of different lengths in each.
    """
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, MISTRAL.vocab_size, (SAMPLES, LENGTH + 1), generator=generator)
    mask = torch.rand(SAMPLES, LENGTH, generator=generator) < torch.linspace(0.1, 1.0, SAMPLES)[:, None]
    starts = (_starts(generator),) if is_packed else ()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask.float(), *starts)


def _starts(generator: torch.Generator) -> torch.Tensor:
    """Index of the first token of each token's own document, int64 [SAMPLES, LENGTH]."""
    starts = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    for sample in range(SAMPLES):
        firsts = torch.randperm(LENGTH, generator=generator)[: sample % 4]
        starts[sample, firsts] = firsts
    return starts.cummax(1).values


def micro_batches(rank: int, size: int, *, is_packed: bool = False) -> list[Batch]:
    """This data-parallel rank's share of the global batch, in Megatron's order."""
    fields = vars(global_batch(is_packed=is_packed))
    begins = range(rank * MICRO_BATCH, SAMPLES, MICRO_BATCH * size)
    return [
        Batch(**{name: None if t is None else t[begin : begin + MICRO_BATCH] for name, t in fields.items()})
        for begin in begins
    ]
