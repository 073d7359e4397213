"""Attention of a few rows over a cache: a program for each part of a sequence and block of rows; then a program a row.

The rows of all query heads that share keys and values are worked on together, so that the cache is read once. Scores
are in base 2, as in attention's kernels.
"""

import triton
import triton.language as tl

from fastlm.ops.attention.triton_common import LOG2_E, score


@triton.jit
def _visible_from(lengths, b, capacity, T, window, HAS_WINDOW: tl.constexpr):
    """(the first column that a row of sequence b sees, its length)."""
    length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), capacity)
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(length - T - window, 0)
    return lowest, length


@triton.jit(do_not_specialize=["capacity", "parts", "page", "pages", "table_width", "T", "group", "H", "window"])
def parts_of_rows(
    q,  # (B, T, H, D) contiguous
    k, v,  # (B, S, H_kv, D), or (pages, page, H_kv, D) with a table
    lengths,  # (B) int32
    table,  # (B, table_width) int32 or None
    slopes,  # (H) or (B, H) float32, or None
    sums,  # (B, parts, H, T, D) float32: of the weights times v
    statistics,  # (2, B, parts, H, T) float32: the largest score, the sum of the weights
    stride_kz: tl.int64, stride_kt: tl.int64, stride_kh: tl.int64,
    stride_vz: tl.int64, stride_vt: tl.int64, stride_vh: tl.int64,
    slopes_stride: tl.int32, capacity: tl.int32, parts: tl.int32, page: tl.int32, pages: tl.int32,
    table_width: tl.int32, batch: tl.int32, T: tl.int32, group: tl.int32, H: tl.int32, window: tl.int32,
    scale: tl.float32, cap: tl.float32,
    D: tl.constexpr, D_PADDED: tl.constexpr, HAS_WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    PART: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: parts * blocks of rows * H_kv * B."""
    program = tl.program_id(0)
    part = program % parts
    blocks = tl.cdiv(group * T, BLOCK_R)
    block = program // parts % blocks
    kv_head = (program // parts // blocks % (H // group)).to(tl.int64)
    b = (program // parts // blocks // (H // group)).to(tl.int64)
    lowest, length = _visible_from(lengths, b, capacity, T, window, HAS_WINDOW)
    first, last = tl.maximum(lowest, part * PART), tl.minimum(length, (part + 1) * PART)
    if first < last:  # nobody reads what the others would leave
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)  # (head of the group, row)
        head, t, real = kv_head * group + r // T, r % T, r < group * T
        d = tl.arange(0, D_PADDED)
        within = (d < D)[None, :]
        q_row = (b * T + t) * H + head
        q_block = tl.load(q + q_row[:, None] * D + d[None, :], mask=real[:, None] & within, other=0.0)
        slope = tl.zeros((BLOCK_R, 1), tl.float32)
        if slopes is not None:
            slope = tl.load(slopes + b * slopes_stride + head, mask=real, other=0.0)[:, None] * LOG2_E
        i = (length - T + t)[:, None]
        k += kv_head * stride_kh
        v += kv_head * stride_vh
        total = tl.zeros((BLOCK_R,), tl.float32)
        largest = tl.full((BLOCK_R,), -float("inf"), tl.float32)
        result = tl.zeros((BLOCK_R, D_PADDED), tl.float32)
        for start in range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            there = (j >= first) & (j < last)
            if table is not None:
                entry = tl.load(table + b * table_width + j // page, mask=there, other=-1).to(tl.int64)
                there = there & (entry >= 0) & (entry < pages)
                entry, row = tl.where(there, entry, 0), (j % page).to(tl.int64)
            else:
                entry, row = b + tl.zeros((BLOCK_N,), tl.int64), j.to(tl.int64)
            mask = there[:, None] & within
            k_block = tl.load(k + (entry * stride_kz + row * stride_kt)[:, None] + d[None, :], mask=mask, other=0.0)
            products = tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION)  # (BLOCK_R, BLOCK_N)
            scores, _ = score(products, i, j[None, :], 0, slope, scale, cap, SOFTCAP, slopes is not None)
            seen = there[None, :] & (j[None, :] <= i)
            if HAS_WINDOW:
                seen = seen & (j[None, :] >= i - window)
            scores = tl.where(seen, scores, -float("inf"))
            new = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(new == -float("inf"), 0.0, new)
            weights = tl.exp2(scores - shift[:, None])
            shrink = tl.exp2(largest - shift)
            total = total * shrink + tl.sum(weights, 1)
            largest = new
            v_block = tl.load(v + (entry * stride_vz + row * stride_vt)[:, None] + d[None, :], mask=mask, other=0.0)
            result = tl.dot(
                weights.to(v_block.dtype), v_block, result * shrink[:, None], input_precision=PRECISION
            )  # fmt: skip
        place = ((b * parts + part) * H + head) * T + t
        tl.store(sums + place[:, None] * D + d[None, :], result, mask=real[:, None] & within)
        tl.store(statistics + place, largest, mask=real)
        tl.store(statistics + batch.to(tl.int64) * parts * H * T + place, total, mask=real)


@triton.jit(do_not_specialize=["capacity", "parts", "T", "H", "window"])
def combine(
    out,  # (B, T, H, D) contiguous
    lengths, sums, statistics,  # as above
    capacity: tl.int32, parts: tl.int32, batch: tl.int32, T: tl.int32, H: tl.int32, window: tl.int32,
    D: tl.constexpr, HAS_WINDOW: tl.constexpr, PART: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The parts of a row together, in their order. Grid: B * T * H."""
    program = tl.program_id(0).to(tl.int64)
    head, t, b = program % H, program // H % T, program // H // T
    lowest, length = _visible_from(lengths, b, capacity, T, window, HAS_WINDOW)
    begin, end = lowest // PART, tl.cdiv(length, PART)
    row = (b * parts * H + head) * T + t  # of part 0
    step = H.to(tl.int64) * T
    totals = statistics + batch.to(tl.int64) * parts * H * T
    largest = -float("inf")
    for start in range(begin, end, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        own = tl.load(statistics + row + part * step, mask=part < end, other=-float("inf"))
        largest = tl.maximum(largest, tl.max(own, 0))
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    d = tl.arange(0, D_PADDED)
    result = tl.zeros((D_PADDED,), tl.float32)
    total = 0.0
    for start in range(begin, end, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        factor = tl.exp2(tl.load(statistics + row + part * step, mask=part < end, other=-float("inf")) - shift)
        total += tl.sum(tl.load(totals + row + part * step, mask=part < end, other=0.0) * factor, 0)
        mask = (part < end)[:, None] & (d < D)[None, :]
        own = tl.load(sums + (row + part * step)[:, None] * D + d[None, :], mask=mask, other=0.0)
        result += tl.sum(own * factor[:, None], 0)
    result = result / tl.where(total == 0, 1.0, total)  # a row with nothing to attend to is zero
    tl.store(out + program * D + d, result.to(out.dtype.element_ty), mask=d < D)
