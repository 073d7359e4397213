"""The linear layer on the GPU: products by PyTorch's library, the bias gradient by a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.checks import autocast_off
from fastlm.ops.gradients import bias_gradient, weight_gradient
from fastlm.ops.linear.native import unsupported

__all__ = ["backward", "forward", "unsupported"]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, wide = x.reshape(-1, x.shape[-1]), weight.shape[0]
    y = x.new_empty((*x.shape[:-1], wide))
    flat = y.view(rows.shape[0], wide)
    with autocast_off(x):
        torch.mm(rows, weight.t(), out=flat) if bias is None else torch.addmm(bias, rows, weight.t(), out=flat)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    dys, rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    with autocast_off(x):
        dx = torch.mm(dys, weight).view(x.shape) if needs[0] else dy.new_empty(0)
        dweight = weight_gradient(dys, rows, dtype) if needs[1] else dy.new_empty(0, dtype=dtype)
    return dx, dweight, bias_gradient(dys, dtype) if needs[2] else dy.new_empty(0, dtype=dtype)
