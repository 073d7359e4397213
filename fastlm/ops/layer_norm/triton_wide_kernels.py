"""The kernels of layer norm and RMS norm for rows that do not fit in the registers of a program.

A program goes through its rows in blocks of BLOCK columns, once for each sum and once for the result; after the first
time they come from the cache. The sums are kept a column of the block each and added up at the end. Statistics in
float32, the variance from the centred values. The weights' gradients are a kernel of their own, down the columns.
"""

import triton
import triton.language as tl


@triton.jit
def _row(x, residual, h, x_place, residual_place, inside):
    """A tile of what is normalised: x, or x + residual as it is rounded where it is stored."""
    value = tl.load(x + x_place, mask=inside, other=0.0)
    if residual is not None:
        added = tl.load(residual + residual_place, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(h.dtype.element_ty)
    return value


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["mean", "rstd"])
def forward_wide(
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
    columns = tl.arange(0, BLOCK)[None, :]
    x_row, residual_row = row[:, None] * x_stride, row[:, None] * residual_stride
    exists = (row < rows)[:, None]
    average = tl.zeros((ROWS, 1), dtype=tl.float32)
    if mean is not None:
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, width, BLOCK):
            column = start + columns
            inside = exists & (column < width)
            total += _row(x, residual, h, x_row + column, residual_row + column, inside).to(tl.float32)
        average = (tl.sum(total, axis=1) / width)[:, None]
        tl.store(mean + row[:, None], average, mask=exists)
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + columns
        inside = exists & (column < width)
        wide = _row(x, residual, h, x_row + column, residual_row + column, inside).to(tl.float32)
        wide = tl.where(inside, wide - average, 0.0)
        squares += wide * wide
    scale = (1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / width + eps))[:, None]
    tl.store(rstd + row[:, None], scale, mask=exists)
    for start in range(0, width, BLOCK):
        column = start + columns
        inside = exists & (column < width)
        value = _row(x, residual, h, x_row + column, residual_row + column, inside)
        place = row[:, None] * width + column
        if residual is not None:
            tl.store(h + place, value, mask=inside)
        result = (value.to(tl.float32) - average) * scale
        result *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        if bias is not None:
            result += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["mean", "rstd"])
def backward_wide(
    dy,  # (rows, width), rows dy_stride apart
    dh,  # (rows, width) or None: the gradient that reaches h from elsewhere
    h,  # (rows, width)
    weight,  # (width)
    mean,  # (rows) float32; None for RMS norm
    rstd,  # (rows) float32
    dx,  # (rows, width), contiguous
    dresidual,  # (rows, width), contiguous, h's dtype; None where dx is it
    rows: tl.int64,
    width: tl.int32,
    dy_stride: tl.int64,
    dh_stride: tl.int64,
    h_stride: tl.int64,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    dy_row, dh_row, h_row = row[:, None] * dy_stride, row[:, None] * dh_stride, row[:, None] * h_stride
    exists = (row < rows)[:, None]
    scale = tl.load(rstd + row[:, None], mask=exists, other=0.0)
    average = tl.zeros((ROWS, 1), dtype=tl.float32)
    if mean is not None:
        average = tl.load(mean + row[:, None], mask=exists, other=0.0)
    along = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + columns
        inside = exists & (column < width)
        normed = (tl.load(h + h_row + column, mask=inside, other=0.0).to(tl.float32) - average) * scale
        g = tl.load(dy + dy_row + column, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        along += g * normed  # g is 0 outside
        if mean is not None:
            total += g
    # dh = rstd (g - mean(g) - xhat mean(g xhat)); RMS norm has no mean to differentiate through
    slope = (tl.sum(along, axis=1) / width)[:, None]
    shift = (tl.sum(total, axis=1) / width)[:, None]
    for start in range(0, width, BLOCK):
        column = start + columns
        inside = exists & (column < width)
        normed = (tl.load(h + h_row + column, mask=inside, other=0.0).to(tl.float32) - average) * scale
        g = tl.load(dy + dy_row + column, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        result = (g - normed * slope - shift) * scale
        if dh is not None:
            result += tl.load(dh + dh_row + column, mask=inside, other=0.0).to(tl.float32)
        place = row[:, None] * width + column
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
        if dresidual is not None:
            tl.store(dresidual + place, result.to(dresidual.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["mean", "rstd"])
def weights_backward_wide(
    dy,  # (rows, width), rows dy_stride apart
    h,  # (rows, width)
    mean,  # (rows) float32; None for RMS norm
    rstd,  # (rows) float32
    partial_dweight,  # (grid's second number, width) float32
    partial_dbias,  # (grid's second number, width) float32 or None
    rows: tl.int64,
    width: tl.int32,
    dy_stride: tl.int64,
    h_stride: tl.int64,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """BLOCK columns, and of the rows every `grid's second number`-th tile."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    first = tl.program_id(1).to(tl.int64) * ROWS
    for start in range(first, rows, tl.num_programs(1).to(tl.int64) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        normed = tl.load(h + row[:, None] * h_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if mean is not None:
            normed -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        normed *= tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        upstream = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dweight += upstream * normed  # upstream is 0 outside
        if partial_dbias is not None:
            dbias += upstream
    position = tl.program_id(1).to(tl.int64) * width + column
    tl.store(partial_dweight + position, tl.sum(dweight, axis=0), mask=column < width)
    if partial_dbias is not None:
        tl.store(partial_dbias + position, tl.sum(dbias, axis=0), mask=column < width)
