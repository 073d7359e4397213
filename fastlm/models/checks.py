"""Checks of token ids that all models make."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(ids: Tensor, vocab_size: int, name: str = "idx") -> None:
    """ValueError for a wrong shape or dtype, and, on the CPU, for an id that the model does not know.

    Reading the ids is cheap on a CPU. On a GPU it would wait for the stream, and in a compiled graph break it: there
    the embedding of such an id is NaN. The errors call the tensor by its `name`.
    """
    if ids.dim() != 2:
        raise ValueError(f"{name} must have shape (B, T), got {tuple(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32 token ids, got {ids.dtype}")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(t) for t in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} holds the token id {wrong}; this model knows 0 to {vocab_size - 1}")
