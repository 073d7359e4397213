"""The linear layer in plain PyTorch: the oracle of every other backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops import memory
from fastlm.ops.checks import autocast_off
from fastlm.ops.gradients import weight_gradient


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with autocast_off(x):
        y = F.linear(x, weight, bias).contiguous()
    return memory.reshaped(y, *y.shape)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y = x @ weight.T + bias: dx, and in `dtype` dweight and dbias; each empty where `needs` says that
    nobody asks."""
    needs_dx, needs_dweight, needs_dbias = needs
    rows = dy.reshape(-1, dy.shape[-1])  # (N, F)
    with autocast_off(x):
        return (
            (rows @ weight).view(x.shape[:-1] + weight.shape[1:]) if needs_dx else dy.new_empty(0),
            weight_gradient(rows, x.reshape(-1, x.shape[-1]), dtype) if needs_dweight else dy.new_empty(0, dtype=dtype),
            rows.sum(0, dtype=dtype) if needs_dbias else dy.new_empty(0, dtype=dtype),
        )
