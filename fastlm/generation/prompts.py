"""The prompts of a call: what may be given, and what it becomes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.models.checks import check_ids

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


def checked_prompts(idx: Prompts, vocab_size: int, device: torch.device, block_size: int | None = None) -> list[Tensor]:
    """The prompts as 1-D int64 tensors on the device.

    Args:
        block_size: the longest prompt that the model reads; None: any.

    Raises:
        ValueError: a prompt is empty, too long, or not token ids that the model knows; says which.
    """
    if isinstance(idx, Tensor) and idx.dim() != 2:
        raise ValueError(f"a tensor of prompts must have shape (B, T), got {tuple(idx.shape)}")
    prompts = []
    for row, prompt in enumerate(idx):
        ids = torch.as_tensor(prompt, device=device)
        if ids.dim() != 1:
            raise ValueError(f"prompt {row} must be a 1-D tensor or a list of token ids, got shape {tuple(ids.shape)}")
        if len(ids) == 0:
            raise ValueError(f"prompt {row} is empty: give at least one token (such as the end-of-text token)")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"prompt {row} must hold integer token ids, got {ids.dtype}")
        if block_size is not None and len(ids) > block_size:
            raise ValueError(
                f"prompt {row} has {len(ids)} tokens, more than this model's context, block_size = {block_size}; "
                f"cut it to its last {block_size} tokens"
            )
        prompts.append(ids.to(torch.int64))
        check_ids(prompts[-1][None], vocab_size)
    return prompts
