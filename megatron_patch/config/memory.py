"""What a run trades for memory: time for activations, transfers for optimizer state."""

import math
from dataclasses import dataclass

from megatron_patch.config.setting import setting

ROUNDING = 1e-6  # of a share: 7 layers of 25 are 0.28 of them, and 0.28 · 25 is a little more than 7


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
    optimizer_offload_fraction: float = setting(
        "share of the layers that static offloading moves; 1: all else too", 1.0
    )

    def layers_on_host(self, layers: int) -> int:
        """How many of a pipeline chunk's first `layers` keep master weights and optimizer state in host memory."""
        if self.optimizer_offload_policy != "static":
            return 0
        return math.ceil(self.optimizer_offload_fraction * layers - ROUNDING)

    @property
    def is_all_on_host(self) -> bool:
        """Whether embedding, output layer and the last norm do so too."""
        return self.optimizer_offload_policy == "static" and self.optimizer_offload_fraction >= 1
