"""Attention cut over ranks, by heads, along the sequence or both, beside one process: the same loss and gradients."""

import dataclasses

import pytest

from layout_step import Trial, check_as_one_process
from megatron_patch.config.parallel import ParallelConfig
from tiny_models import DEEPSEEK

LATENT = dataclasses.replace(DEEPSEEK, num_layers=2, num_moe_experts=0)
LITE = dataclasses.replace(LATENT, q_lora_rank=None)


def layout(tp: int = 1, cp: int = 1, *, sp: bool = False) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=sp)


@pytest.mark.parametrize("sp", [False, True], ids=["tp", "tp-sp"])
@pytest.mark.parametrize("model", [LATENT, LITE], ids=["compressed queries", "plain queries"])
def test_latent_attention_shares_its_heads(model, sp):
    check_as_one_process(Trial("deepseek_v2", layout(2, sp=sp), 2, model=model))
