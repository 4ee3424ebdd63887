"""What a run trades for memory: time for activations, transfers for optimizer state."""

from dataclasses import dataclass

from megatron_patch.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How activations wait for the backward pass, and where optimizer state stands."""

    recompute_granularity: str = setting(
        "AC: activations computed again in the backward pass; selective: those of core attention",
        "none",
        choices=("none", "selective", "full"),
    )
    recompute_num_layers: int = setting("MP_AC_LAYERS: layers that are recomputed together, with AC full", 1)
    cpu_offloading_num_layers: int = setting("AC offload: first layers whose activations wait in host memory", 0)
    optimizer_offload_policy: str = setting(
        "OPTIMIZER_OFFLOAD: master weights and optimizer state in host memory; auto: of as many layers as do not fit",
        "none",
        choices=("none", "static", "auto"),
    )
    optimizer_offload_fraction: float = setting("share of the layers that static offloading moves", 1.0)
