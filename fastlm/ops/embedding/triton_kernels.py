"""The kernels of the embedding: a gather, and a sum over the places of each id in a fixed order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def forward(
    ids,  # (count) int64 or int32, contiguous
    weight,  # (rows, width), rows weight_stride apart
    y,  # (count, width), contiguous
    rows: tl.int64,
    width: tl.int32,
    weight_stride: tl.int64,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + place).to(tl.int64)
    known = (row >= 0) & (row < rows)
    value = tl.load(weight + tl.where(known, row, 0) * weight_stride + column, mask=column < width, other=0.0)
    value = tl.where(known, value.to(tl.float32), float("nan"))  # looking for an unknown id would wait for the device
    tl.store(y + place * width + column, value.to(y.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["count", "rows", "padding"])
def backward(
    dy,  # (count, width), rows dy_stride apart
    keys,  # (count) int64: the ids, sorted
    order,  # (count) int64: where in dy each of them is
    dweight,  # (rows, width), zeros
    count: tl.int64,
    rows: tl.int64,
    padding: tl.int64,
    width: tl.int32,
    dy_stride: tl.int64,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
):
    """The program of the first place of an id adds up all of them, PLACES at a time, in the order of the text."""
    first = tl.program_id(0).to(tl.int64)
    key = tl.load(keys + first)
    before = tl.load(keys + tl.maximum(first - 1, 0))
    starts = ((first == 0) | (before != key)) & (key >= 0) & (key < rows) & (key != padding)
    if starts:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((PLACES, BLOCK), dtype=tl.float32)
        start = first
        more = starts
        while more:
            place = start + tl.arange(0, PLACES)
            same = tl.load(keys + place, mask=place < count, other=-1) == key
            source = tl.load(order + place, mask=same, other=0)
            inside = same[:, None] & (column < width)[None, :]
            total += tl.load(dy + source[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            start += PLACES
            more = tl.sum(same.to(tl.int32), axis=0) == PLACES
        result = tl.sum(total, axis=0).to(dweight.dtype.element_ty)
        tl.store(dweight + key * width + column, result, mask=column < width)
