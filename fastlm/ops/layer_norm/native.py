"""Layer norm and RMS norm through fastlm._C: the C++ kernel on CPU tensors, the CUDA kernel on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import memory, native
from fastlm.ops.native import DTYPE_CODE, pointer, rows


def unsupported(x, weight, bias, residual, eps, rms) -> str | None:
    for t in (x, weight, residual):
        if t is not None and t.dtype not in DTYPE_CODE:
            return f"its kernels are for float32, bfloat16 and float16, got {t.dtype}"
    if x.is_cuda and x.shape[-1] > 65536:
        return f"its CUDA kernel is for widths up to 65,536, got {x.shape[-1]}"
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Where sizes are given one by one, or not at all, torch allocates in half the time.
    *leading, cols = x.shape
    y = memory.empty_like(x)
    parts = 1 if rms else 2  # rstd; mean and rstd
    statistics = x.new_empty(parts, *leading, dtype=torch.float32)
    count = statistics.numel() // parts
    mean = statistics.data_ptr()
    x, x_stride = rows(x)
    if residual is None:
        h, h_type, residual_stride = x.new_empty(0), x.dtype, 0
    else:
        h, h_type = memory.empty_like(residual), residual.dtype
        residual, residual_stride = rows(residual)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    native.C.layer_norm_forward(
        x.is_cuda,
        x.data_ptr(),
        pointer(residual),
        weight.data_ptr(),
        pointer(bias),
        y.data_ptr(),
        0 if residual is None else h.data_ptr(),
        0 if rms else mean,
        mean if rms else mean + 4 * count,
        count,
        cols,
        x_stride,
        residual_stride,
        eps,
        rms,
        DTYPE_CODE[x.dtype],
        DTYPE_CODE[h_type],
        DTYPE_CODE[weight.dtype],
        native.stream(x),
    )
    return y, h, statistics


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    statistics: Tensor,
    has_bias: bool,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cols = dy.shape[-1]
    dx = memory.empty_like(dy)
    dresidual = memory.empty_like(h) if h.dtype != dy.dtype else h.new_empty(0)
    weight = weight.contiguous()
    dweight = weight.new_empty(cols)
    dbias = weight.new_empty(cols if has_bias else 0)
    sms = native.multiprocessors(dy.device.index) if dy.is_cuda else 0
    count = statistics.numel() // (1 if rms else 2)
    mean = statistics.data_ptr()
    workspace = statistics.new_empty(native.C.layer_norm_backward_workspace(dy.is_cuda, count, cols, sms))
    dy, dy_stride = rows(dy)
    h, h_stride = rows(h)
    dh_stride = 0
    if dh is not None:
        dh, dh_stride = rows(dh)
    native.C.layer_norm_backward(
        dy.is_cuda,
        dy.data_ptr(),
        pointer(dh),
        h.data_ptr(),
        weight.data_ptr(),
        0 if rms else mean,
        mean if rms else mean + 4 * count,
        dx.data_ptr(),
        dresidual.data_ptr() if dresidual.numel() else 0,
        dweight.data_ptr(),
        dbias.data_ptr() if has_bias else 0,
        workspace.data_ptr(),
        count,
        cols,
        dy_stride,
        dh_stride,
        h_stride,
        rms,
        DTYPE_CODE[dy.dtype],
        DTYPE_CODE[h.dtype],
        DTYPE_CODE[weight.dtype],
        sms,
        native.stream(dy),
    )
    return dx, dresidual, dweight, dbias
