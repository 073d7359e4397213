"""The linear layer on the GPU: products by PyTorch's library, the bias gradient by csrc/linear/column_sums.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import native
from fastlm.ops.checks import autocast_off
from fastlm.ops.gradients import weight_gradient
from fastlm.ops.linear.native import unsupported
from fastlm.ops.native import DTYPE_CODE

__all__ = ["backward", "column_sums", "forward", "unsupported"]


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
    return dx, dweight, column_sums(dys, dtype) if needs[2] else dy.new_empty(0, dtype=dtype)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (M, N) summed over its rows, in float32 in an order that depends on the sizes alone: (N), in `dtype`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, cols = x.shape
    sums = x.new_empty(cols, dtype=dtype)
    workspace = x.new_empty(native.C.column_sums_workspace_cuda(rows, cols), dtype=torch.float32)
    pointers = x.data_ptr(), sums.data_ptr(), workspace.data_ptr()
    types = DTYPE_CODE[x.dtype], DTYPE_CODE[dtype]
    native.C.column_sums_cuda(*pointers, rows, cols, x.stride(0), *types, native.stream(x))
    return sums
