"""The embedding through fastlm._C: the C++ kernels on CPU tensors, the CUDA kernels on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import memory, native
from fastlm.ops.native import DTYPE_CODE, rows


def unsupported(ids: Tensor, weight: Tensor, *rest: object) -> str | None:
    if weight.dtype not in DTYPE_CODE:
        return f"its kernels are for float32, bfloat16 and float16, got {weight.dtype}"
    return None


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    y = weight.new_empty(*ids.shape, weight.shape[1])
    ids = ids.contiguous()
    weight, stride = rows(weight)
    native.C.embedding_forward(
        weight.is_cuda,
        ids.data_ptr(),
        ids.dtype == torch.int64,
        weight.data_ptr(),
        y.data_ptr(),
        ids.numel(),
        *weight.shape,
        stride,
        DTYPE_CODE[weight.dtype],
        native.stream(weight),
    )
    return y


def backward(dy: Tensor, ids: Tensor, vocabulary: int, padding: int) -> Tensor:
    cols = dy.shape[-1]
    keys, order = ids.reshape(-1).to(torch.int64).sort(stable=True)
    if dy.is_cuda:
        dweight = dy.new_zeros(vocabulary, cols)
    else:  # clearing kept memory takes a third of the time that the page faults of fresh memory do
        dweight = memory.empty((vocabulary, cols), dy.dtype).zero_()
    floats = native.C.embedding_backward_workspace(dy.is_cuda, keys.numel(), cols)
    workspace = dy.new_empty(floats, dtype=torch.float32)
    dy, stride = rows(dy)
    native.C.embedding_backward(
        dy.is_cuda,
        dy.data_ptr(),
        keys.data_ptr(),
        order.data_ptr(),
        dweight.data_ptr(),
        workspace.data_ptr(),
        keys.numel(),
        vocabulary,
        cols,
        stride,
        padding,
        DTYPE_CODE[dy.dtype],
        native.stream(dy),
    )
    return dweight
