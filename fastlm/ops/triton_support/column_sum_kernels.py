"""Sums down the columns of a float32 matrix, in a fixed order: the second half of every deterministic reduction."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def column_sum(
    partial,  # (grid's second number, rows, width) float32
    total,  # (grid's second number, width): the first matrix's sums
    other_total,  # (width): the second matrix's sums, or None
    rows: tl.int32,
    width: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    partial += tl.program_id(1).to(tl.int64) * rows * width
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        sums += tl.load(partial + row.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)
    result = tl.sum(sums, axis=0)
    if tl.program_id(1) == 0:
        tl.store(total + column, result.to(total.dtype.element_ty), mask=column < width)
    elif other_total is not None:
        tl.store(other_total + column, result.to(other_total.dtype.element_ty), mask=column < width)
