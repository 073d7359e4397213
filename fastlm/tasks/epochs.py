"""Passes over the training examples, as a number of steps."""

from __future__ import annotations

import math

from fastlm.data.examples import ExampleLoader
from fastlm.training.config import RunConfig


def set_steps(config: RunConfig, epochs: float, train: ExampleLoader) -> None:
    """Set training.steps to so many passes over the examples; 0 leaves it as it is.

    Raises:
        ValueError: a negative number, or one that is not finite.
    """
    if not 0 <= epochs < math.inf:
        raise ValueError(f"task.epochs must be at least 0 and finite, got {epochs}")
    if epochs:
        step = train.samples_per_batch * config.training.grad_accum * train.world_size
        config.training.steps = max(1, math.ceil(epochs * train.samples_per_epoch / step))
