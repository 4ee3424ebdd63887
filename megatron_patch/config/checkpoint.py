"""Where weights come from and go to."""

from dataclasses import dataclass

from megatron_patch.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Start weights, output directory, and how often to write."""

    load: str | None = setting("checkpoint directory to start from; absent: random initialisation", None)
    save: str = setting("directory that receives iter_NNNNNNN and the tracker file")
    save_interval: int = setting("iterations between checkpoints; one is also written at the end")
    ckpt_format: str = setting("torch: classic mp_rank_XX files, weights only", "torch", choices=("torch",))
    overwrite: bool = setting("replace the checkpoints of an earlier run of the same name", False)
