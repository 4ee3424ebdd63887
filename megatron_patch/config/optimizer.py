"""How weights move."""

from dataclasses import dataclass

from megatron_patch.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule, counted in iterations."""

    lr: float = setting("peak learning rate")
    min_lr: float = setting("final learning rate")
    lr_warmup_iters: int = setting("iterations from 0 to the peak", 0)
    lr_decay_iters: int = setting("iteration at which the final learning rate is reached")
    lr_decay_style: str = setting("shape between peak and final", "cosine", choices=("cosine", "linear", "constant"))
    weight_decay: float = setting("decoupled weight decay of matrices (norms are never decayed)", 0.1)
    adam_beta1: float = setting("decay of the gradient average", 0.9)
    adam_beta2: float = setting("decay of the squared-gradient average", 0.95)
    adam_eps: float = setting("added to the denominator", 1e-8)
    clip_grad: float = setting("largest global gradient norm; 0: no clipping", 1.0)
