"""Checks of token ids that all models make."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(idx: Tensor, vocab_size: int) -> None:
    """ValueError for a wrong shape or dtype, and, on the CPU, for an id that the model does not know.

    Reading the ids is cheap on a CPU. On a GPU it would wait for the stream, and in a compiled graph break it: there
    the embedding of such an id is NaN.
    """
    if idx.dim() != 2:
        raise ValueError(f"idx must have shape (B, T), got {tuple(idx.shape)}")
    if idx.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"idx must be int64 or int32 token ids, got {idx.dtype}")
    if idx.device.type == "cpu" and idx.numel() and not torch.compiler.is_compiling():
        low, high = (int(t) for t in torch.aminmax(idx))
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"idx holds the token id {wrong}; this model knows 0 to {vocab_size - 1}")
