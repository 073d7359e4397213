"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from fastlm.training.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of optimizer step `step` (0-based).

    A linear warm-up to `lr` over `warmup_steps`, then one of
      cosine    half a cosine down to lr * min_lr_ratio at the last step (SGDR without restarts, Loshchilov & Hutter
                2017)
      linear    a straight line to the same
      wsd       constant, then a straight line down to the same over the last `decay_fraction` of the steps (warm-up,
                stable, decay; Hu et al. 2024)
      constant
    """
    low = config.lr * config.min_lr_ratio
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    last = config.steps - 1
    if config.schedule == "constant":
        return config.lr
    begin = warmup
    if config.schedule == "wsd":
        begin = max(warmup, config.steps - round(config.steps * config.decay_fraction))
        if step < begin:
            return config.lr
    progress = min(1.0, (step - begin + 1) / max(1, last - begin + 1))
    if config.schedule == "cosine":
        return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr + (low - config.lr) * progress
