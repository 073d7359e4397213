"""The kernels of layer norm and RMS norm: a program holds whole rows in registers, so each is read once.

A tile is (ROWS, BLOCK): BLOCK, a power of two, is at least the width. Statistics in float32, the variance from the
centred values (two passes over registers, one over memory).
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["mean", "rstd"])
def forward(
    x,  # (rows, width), rows x_stride apart
    residual,  # (rows, width) or None
    weight,  # (width)
    bias,  # (width) or None
    y,  # (rows, width), contiguous
    h,  # (rows, width), contiguous: x + residual; None without
    mean,  # (rows) float32; None for RMS norm
    rstd,  # (rows) float32
    rows: tl.int64,
    width: tl.int32,
    x_stride: tl.int64,
    residual_stride: tl.int64,
    eps: tl.float32,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    if residual is not None:
        added = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(h.dtype.element_ty)
        tl.store(h + row[:, None] * width + column[None, :], value, mask=inside)
    wide = value.to(tl.float32)
    if mean is not None:
        average = tl.sum(wide, axis=1) / width
        tl.store(mean + row, average, mask=row < rows)
        wide = tl.where(inside, wide - average[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=1) / width + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    result = wide * scale[:, None] * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        result += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * width + column[None, :], result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["mean", "rstd"])
def backward(
    dy,  # (rows, width), rows dy_stride apart
    dh,  # (rows, width) or None: the gradient that reaches h from elsewhere
    h,  # (rows, width)
    weight,  # (width)
    mean,  # (rows) float32; None for RMS norm
    rstd,  # (rows) float32
    dx,  # (rows, width), contiguous
    dresidual,  # (rows, width), contiguous, h's dtype; None where dx is it
    partial_dweight,  # (programs, width) float32
    partial_dbias,  # (programs, width) float32 or None
    rows: tl.int64,
    width: tl.int32,
    dy_stride: tl.int64,
    dh_stride: tl.int64,
    h_stride: tl.int64,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for start in range(first, rows, tl.num_programs(0).to(tl.int64) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(h + row[:, None] * h_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if mean is not None:
            normed = tl.where(inside, normed - tl.load(mean + row, mask=row < rows, other=0.0)[:, None], 0.0)
        normed *= scale
        upstream = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dweight += upstream * normed
        if partial_dbias is not None:
            dbias += upstream
        # dh = rstd (g - mean(g) - xhat mean(g xhat)); RMS norm has no mean to differentiate through
        g = upstream * w
        result = g - normed * (tl.sum(g * normed, axis=1) / width)[:, None]
        if mean is not None:
            result -= (tl.sum(g, axis=1) / width)[:, None]
        result *= scale
        if dh is not None:
            position = row[:, None] * dh_stride + column[None, :]
            result += tl.load(dh + position, mask=inside, other=0.0).to(tl.float32)
        position = row[:, None] * width + column[None, :]
        tl.store(dx + position, result.to(dx.dtype.element_ty), mask=inside)
        if dresidual is not None:
            tl.store(dresidual + position, result.to(dresidual.dtype.element_ty), mask=inside)
    position = tl.program_id(0).to(tl.int64) * width + column
    tl.store(partial_dweight + position, tl.sum(dweight, axis=0), mask=column < width)
    if partial_dbias is not None:
        tl.store(partial_dbias + position, tl.sum(dbias, axis=0), mask=column < width)
