"""Scoring with a recurrent model, and what it shares with a Transformer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastlm.models.gpt import GPT
from fastlm.models.lstm import LSTMLM
from fastlm.nn.modes import autocast, evaluating

CausalModel = GPT | LSTMLM
PIECE = 1024  # tokens read at once: the state goes on from piece to piece, so the number changes no result


def loss_of(model: CausalModel, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """The loss of predicting y (B, T) from x (B, T)."""
    if isinstance(model, LSTMLM):
        return model(x, targets=y, reduction=reduction)[0]
    _, loss = model(x, y, reduction=reduction)
    assert loss is not None
    return loss


def context_of(model: CausalModel) -> int:
    """The longest sequence that the model reads."""
    return 1 << 40 if isinstance(model, LSTMLM) else model.config.block_size


def score_recurrent(
    model: LSTMLM,
    ids: np.ndarray,
    *,
    first: int | None = None,
    precision: str = "fp32",
    progress: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Sum of -ln p(token | all tokens before it) over the ids, and how many were scored; see `score_tokens`."""
    sequence = np.asarray(ids).astype(np.int64)
    if first is not None:
        sequence = np.concatenate(([first], sequence))
    if len(sequence) < 2:
        raise ValueError(f"nothing to score: {len(sequence)} token, at least 2 are needed")
    device = model.device
    total, hidden = 0.0, None
    with torch.no_grad(), evaluating(model), autocast(device, precision):
        for begin in range(0, len(sequence) - 1, PIECE):
            piece = torch.from_numpy(sequence[begin : begin + PIECE + 1])[None].to(device)
            loss, hidden = model(piece[:, :-1], hidden, targets=piece[:, 1:], reduction="sum")
            total += float(loss)
            if progress is not None:
                progress(piece.shape[1] - 1)
    return total, len(sequence) - 1
