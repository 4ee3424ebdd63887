"""Megatron-Core's training step of one of our architectures on one device, for benchmarks that find it importable.

Its layers are Transformer Engine's where that is installed, as its users have it, else its own.
"""

import os
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_patch.config.model import ModelConfig
from megatron_patch.config.optimizer import OptimizerConfig

# Fields that mean the same in both but are written otherwise there, or have no place beside latent attention.
UNLIKE = {"window_size", "rotary_interleaved", "moe_router_num_groups", "moe_router_group_topk"}
HAS_MEGATRON, HAS_ENGINE = (find_spec(name) is not None for name in ("megatron", "transformer_engine"))


def megatron_step(
    config: ModelConfig, optimizer: OptimizerConfig, tokens: Tensor, precision: str, device: torch.device
) -> Callable[[], float]:
    """A step of all `tokens` [samples, length + 1]; the default process group must hold this process alone."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig as Settings
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    is_half = precision != "fp32"
    settings = configuration(config, precision)
    model = build(config, settings, tokens.shape[1] - 1).to(device)
    model = Float16Module(settings, model) if is_half else model
    model = DistributedDataParallel(settings, DistributedDataParallelConfig(grad_reduce_in_fp32=is_half), model)
    moved = get_megatron_optimizer(
        Settings(
            optimizer="adam",
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            clip_grad=optimizer.clip_grad,
            bf16=is_half,
            params_dtype=settings.params_dtype,
        ),
        [model],
    )
    inputs, labels = (part.contiguous().to(device) for part in (tokens[:, :-1], tokens[:, 1:]))
    positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)

    def step() -> float:
        model.zero_grad_buffer()
        moved.zero_grad()
        loss = model(inputs, positions, attention_mask=None, labels=labels).float().mean()
        loss.backward()
        model.finish_grad_sync()
        moved.step()
        return loss.item()

    return step


def configuration(config: ModelConfig, precision: str):
    """Megatron-Core's configuration of `config`, whose fields have its names."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if config.is_mla else TransformerConfig
    known = {field.name for field in fields(kind)} - UNLIKE
    same = {name: value for name, value in vars(config).items() if name in known and value is not None}
    if config.window_size is not None:
        same["window_size"] = (config.window_size - 1, 0)
    if config.num_moe_experts:
        dense, shared = config.moe_first_dense_layers, config.moe_shared_expert_intermediate_size
        same["moe_layer_freq"] = [int(layer >= dense) for layer in range(config.num_layers)]
        same |= {"moe_shared_expert_intermediate_size": shared or None, "moe_grouped_gemm": HAS_ENGINE}
        same |= {"moe_token_dispatcher_type": "alltoall"}
    else:
        same = {name: value for name, value in same.items() if "moe" not in name}
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return kind(
        **same,
        layernorm_epsilon=config.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=precision != "fp32",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        fp8="hybrid" if precision == "fp8" else None,
        bias_activation_fusion=HAS_ENGINE,
        apply_rope_fusion=HAS_ENGINE and not config.is_mla,
        cross_entropy_loss_fusion=True,
        gradient_accumulation_fusion=False,  # needs Apex
        use_cpu_initialization=not torch.cuda.is_available(),
    )


def build(config: ModelConfig, settings, length: int):
    """The whole decoder."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=HAS_ENGINE, normalization="RMSNorm")
    return GPTModel(
        config=settings,
        transformer_layer_spec=spec,
        vocab_size=config.vocab_size,
        max_sequence_length=length,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
    )
