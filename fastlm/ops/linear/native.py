"""The linear layer on the CPU, by products.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import memory, products
from fastlm.ops.checks import autocast_off
from fastlm.ops.gradients import bias_gradient
from fastlm.ops.native import DTYPE_CODE


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dtype not in DTYPE_CODE:
        return f"it is for float32, bfloat16 and float16, got {x.dtype}"
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    width, depth = weight.shape
    count = x.numel() // depth
    if count <= products.SKINNY_ROWS and weight.stride(1) == 1:
        y = x.new_empty(*x.shape[:-1], width)
        products.skinny(x, weight, bias, y, count)
        return y
    with autocast_off(x):
        return memory.reshaped(products.linear(x.reshape(-1, depth), weight, bias), *x.shape[:-1], width)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    dys, xs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    with autocast_off(x):
        dx = products.linear(dys, weight.t()).view(x.shape) if needs[0] else dy.new_empty(0)
        dweight = products.linear(dys.t(), xs.t(), dtype=dtype) if needs[1] else dy.new_empty(0, dtype=dtype)
        dbias = bias_gradient(dys, dtype) if needs[2] else dy.new_empty(0, dtype=dtype)
    return dx, dweight, dbias
