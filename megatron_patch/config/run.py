"""One training run, whole: every setting that a rank needs, resolved."""

from dataclasses import dataclass, field

from megatron_patch.config.checkpoint import CheckpointConfig
from megatron_patch.config.data import DataConfig
from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The concerns of a run, and what belongs to none of them."""

    model: ModelConfig
    parallel: ParallelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig

    family: str = setting("model family: whose weight manifest applies")
    train_iters: int = setting("optimizer steps")
    micro_batch_size: int = setting("samples per forward pass and data-parallel rank")
    global_batch_size: int = setting("samples per optimizer step, over all ranks")
    precision: str = setting(
        "compute precision; master weights and reductions are always fp32",
        "bf16",
        choices=("bf16", "fp16", "fp8", "fp32"),
    )
    use_flash_attn: bool = setting("fastest attention kernel available; off: the plain one", True)
    torch_compile: str = setting(
        "layers compiled at their first step; auto: on CUDA only", "auto", choices=("auto", "on", "off")
    )
    max_nonfinite_steps: int = setting("steps in a row with NaN or infinity, each skipped, that end the run", 10)
    log_interval: int = setting("iterations between console lines", 1)
    eval_interval: int = setting("iterations between validations", 10000)
    eval_iters: int = setting("global batches per validation; 0: no validation", 10)
    tensorboard_dir: str | None = setting("directory of TensorBoard events; absent: none", None)
    log_file: str | None = setting("JSON lines, one per iteration; absent: none", None)
