"""The learning rate as a pure function of the iterations already done."""

import math

from megatron_patch.config.optimizer import OptimizerConfig


def learning_rate(config: OptimizerConfig, done: int) -> float:
    """Rate of the step after `done` steps: linear from 0 to `lr`, then to `min_lr` at `lr_decay_iters`, then constant.

    The first step of a warm-up has rate 0, as in Megatron-Core's OptimizerParamScheduler.
    """
    warmup, decay = config.lr_warmup_iters, config.lr_decay_iters
    if warmup and done <= warmup:
        return config.lr * done / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if done > decay:
        return config.min_lr
    progress = (done - warmup) / (decay - warmup)
    share = (1 + math.cos(math.pi * progress)) / 2 if config.lr_decay_style == "cosine" else 1 - progress
    return config.min_lr + share * (config.lr - config.min_lr)
