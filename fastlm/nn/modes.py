"""Ways to run a model for a while: as in use instead of as in training, and in low precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the `with` block; then the mode before it, also after an error.

    >>> with torch.no_grad(), evaluating(model):
    ...     logits, _ = model(idx)
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The `precision` of a run: "bf16" is torch's autocast to bfloat16; "fp32" leaves all as it is."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
