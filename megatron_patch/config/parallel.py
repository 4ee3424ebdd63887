"""How a run is spread over ranks."""

from dataclasses import dataclass

from megatron_patch.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel axes; the data-parallel size is what remains of the world."""

    tensor_model_parallel_size: int = setting("TP: ranks that share each matrix", 1)
    pipeline_model_parallel_size: int = setting("PP: stages that share the layers", 1)
    context_parallel_size: int = setting("CP: ranks that share each sequence", 1)
    expert_model_parallel_size: int = setting("EP: ranks that share the experts", 1)
    expert_tensor_parallel_size: int | None = setting("ranks that share each expert matrix, 1 or TP; absent: TP", None)
    num_layers_per_virtual_pipeline_stage: int | None = setting("MP_VP: layers of each interleaved chunk", None)
    decoder_first_pipeline_num_layers: int | None = setting("MP_PP0_LAYERS: layers of the first stage", None)
    sequence_parallel: bool = setting("shard activations between tensor-parallel regions along the sequence", False)
    use_distributed_optimizer: bool = setting(
        "shard master weights, gradients and optimizer state over the data-parallel ranks (else each holds them all)",
        True,
    )
    distributed_timeout_minutes: float = setting("longest wait for a rank that does not move before the run ends", 10.0)
