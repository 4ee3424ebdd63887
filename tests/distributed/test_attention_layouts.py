"""Attention cut over ranks, by heads, along the sequence or both, beside one process: the same loss and gradients."""

import dataclasses

import pytest

from layout_step import Trial, check_as_one_process
from megatron_patch.config.parallel import ParallelConfig
from tiny_models import DEEPSEEK, LLAMA, MISTRAL

LATENT = dataclasses.replace(DEEPSEEK, num_layers=2, num_moe_experts=0)
LITE = dataclasses.replace(LATENT, q_lora_rank=None)
WINDOW = dataclasses.replace(MISTRAL, num_layers=2)
FULL = dataclasses.replace(LLAMA, num_layers=2)


def layout(tp: int = 1, cp: int = 1, *, sp: bool = False) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=sp)


@pytest.mark.parametrize(("model", "sp"), [(LATENT, False), (LATENT, True), (LITE, False)])
def test_tensor_parallel_ranks_share_the_heads_of_latent_attention(model, sp):
    check_as_one_process(Trial("deepseek_v2", layout(2, sp=sp), 2, model=model))


@pytest.mark.parametrize(
    ("name", "model", "parallel", "world"),
    [
        ("mistral", WINDOW, layout(2, 2, sp=True), 4),
        ("mistral", WINDOW, layout(cp=4), 4),
        ("llama", FULL, layout(2, 2), 4),
        ("deepseek_v2", LATENT, layout(cp=2), 4),
        ("deepseek_v2", LITE, layout(2, 2, sp=True), 4),
    ],
)
def test_ranks_that_share_a_sequence_have_the_loss_and_gradients_of_one_process(name, model, parallel, world):
    check_as_one_process(Trial(name, parallel, world, model=model))


@pytest.mark.parametrize(
    ("name", "model", "parallel", "world"),
    [
        ("mistral", WINDOW, layout(cp=2), 2),
        ("llama", FULL, layout(2, 2, sp=True), 4),
        ("deepseek_v2", LATENT, layout(2, 2, sp=True), 4),
        ("llama", FULL, dataclasses.replace(layout(), pipeline_model_parallel_size=2), 2),
    ],
)
def test_packed_samples_have_the_loss_and_gradients_of_one_process_on_any_layout(name, model, parallel, world):
    check_as_one_process(Trial(name, parallel, world, model=model, is_packed=True))
