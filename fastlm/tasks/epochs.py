"""Passes over the training examples, as a number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastlm.data.examples import ExampleLoader
from fastlm.training.config import RunConfig, parse_override


def let_steps_count(config: RunConfig, overrides: Sequence[str]) -> None:
    """Set task.epochs to 0 where the overrides, which the config has been read with, say training.steps.

    In a file epochs count: a run's own has both, the steps as they followed from the epochs. What is said in the
    command is meant.

    Raises:
        ValueError: the overrides say both.
    """
    given = [parse_override(override)[:2] for override in overrides]
    if ("training", "steps") not in given or not config.task.get("epochs"):
        return
    if ("task", "epochs") in given:
        raise ValueError(
            f"wanted training.steps or task.epochs, got both: {config.training.steps} and {config.task['epochs']}"
        )
    config.task["epochs"] = 0.0


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
