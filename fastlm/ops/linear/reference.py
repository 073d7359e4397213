"""The linear layer in plain PyTorch: the oracle of every other backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops import memory
from fastlm.ops.checks import autocast_off
from fastlm.ops.mlp.reference import linear_backward


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with autocast_off(x):
        y = F.linear(x, weight, bias).contiguous()
    return memory.reshaped(y, *y.shape)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    with autocast_off(x):
        return linear_backward(dy, x, weight, needs, dtype)
