"""The forward kernel of attention in Triton: online softmax over blocks of columns (FlashAttention-2)."""

import triton
import triton.language as tl

from fastlm.ops.attention.triton_common import (
    LOG2_E,
    columns_of_rows,
    keep,
    load_rows,
    phases,
    plane,
    read,
    score,
    sequence,
    store_rows,
    visible,
)


@triton.jit
def _attend(
    accumulated, total, largest, q, i, begin, end,
    k, v, k_plane, v_plane, z, kv_head, stride_kt, stride_vt, columns, diagonal, left, right, scale, cap, slope,
    rng_state, threshold, number, first,
    UNIT: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, FOLD: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The columns begin .. end, in blocks. MASKED: not every row sees every one of them."""
    for start in tl.range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        k_block = read(
            k, k_plane, z, start, kv_head, columns, stride_kt, UNIT, BLOCK_N, D, D_PADDED, MASKED, DESCRIPTORS
        )  # fmt: skip
        products = tl.dot(q, tl.trans(k_block), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)[None, :]
        if MASKED:
            seen = visible(i[:, None], j, columns, diagonal, left, right, HAS_LEFT, HAS_RIGHT)
        if FOLD:  # one multiplication and addition an element: the scale is positive, so the largest stays the largest
            if MASKED:
                products = tl.where(seen, products, -float("inf"))
            new = tl.maximum(largest, tl.max(products, 1) * scale)
            shift = tl.where(new == -float("inf"), 0.0, new)  # a row that has seen nothing: exp2(-inf - 0) is 0
            weights = tl.exp2(products * scale - shift[:, None])
        else:
            scores, _ = score(products, i[:, None], j, diagonal, slope, scale, cap, SOFTCAP, ALIBI)
            if MASKED:
                scores = tl.where(seen, scores, -float("inf"))
            new = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(new == -float("inf"), 0.0, new)
            weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(weights, 1)
        accumulated = accumulated * shrink[:, None]
        largest = new
        if rng_state is not None:
            kept = keep(rng_state, threshold, number, first, i, start, False, ALIGNED, BLOCK_N)
            weights = tl.where(kept, weights, 0.0)
        v_block = read(
            v, v_plane, z, start, kv_head, columns, stride_vt, UNIT, BLOCK_N, D, D_PADDED, MASKED, DESCRIPTORS
        )  # fmt: skip
        accumulated = tl.dot(weights.to(v_block.dtype), v_block, accumulated, input_precision=PRECISION)
    return accumulated, total, largest


@triton.jit(
    do_not_specialize=[
        "stride_qz", "stride_qt", "stride_qh", "stride_kz", "stride_kt", "stride_kh", "stride_vz", "stride_vt",
        "stride_vh", "slopes_stride", "blocks", "rows", "columns", "left", "right",
    ]
)  # fmt: skip
def forward(
    q, k, v,  # (B, T, H, D), (B, S, H_kv, D) twice: k and v themselves or DESCRIPTORS of them
    out, lse,  # (B, T, H, D) contiguous, (B, H, T)
    slopes, cu_seqlens, rng_state,  # None where there are none; slopes times log2(e)
    stride_qz: tl.int64, stride_qt: tl.int32, stride_qh: tl.int64,  # of q, k and v in UNITs
    stride_kz: tl.int64, stride_kt: tl.int32, stride_kh: tl.int64,
    stride_vz: tl.int64, stride_vt: tl.int32, stride_vh: tl.int64,
    slopes_stride: tl.int32, blocks: tl.int32,  # of rows in the longest sequence
    rows: tl.int32, columns: tl.int32, left: tl.int32, right: tl.int32,
    scale: tl.float32, cap: tl.float32, threshold: tl.uint32, keep_scale: tl.float32,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, UNIT: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FOLD: tl.constexpr,
    ALIGNED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head. Grid: blocks * H * sequences, the heads of a sequence side by side (they share
    k and v in the cache), and the last rows first (where causal, they have the most to do)."""
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    head = program // blocks % H
    sequence_number = program // blocks // H
    z, first, rows_here, columns_here = sequence(cu_seqlens, sequence_number, rows, columns)
    diagonal = columns_here - rows_here
    kv_head = head // GROUP
    start = block * BLOCK_M
    i = start + tl.arange(0, BLOCK_M)
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + z * slopes_stride + head)
    q_plane = plane(q, z, head, first, stride_qz, stride_qh, stride_qt, UNIT, False)
    k_plane = plane(k, z, kv_head, first, stride_kz, stride_kh, stride_kt, UNIT, DESCRIPTORS)
    v_plane = plane(v, z, kv_head, first, stride_vz, stride_vh, stride_vt, UNIT, DESCRIPTORS)
    q_block = load_rows(q_plane, start, rows_here, stride_qt, UNIT, BLOCK_M, D, D_PADDED, True)

    last = tl.minimum(start + BLOCK_M, rows_here) - 1
    bounds = columns_of_rows(start, last, columns_here, diagonal, left, right, HAS_LEFT, HAS_RIGHT)
    a, b, c, d = phases(bounds[0], bounds[1], bounds[2], bounds[3], BLOCK_N)
    if start >= rows_here:  # a sequence shorter than the longest
        a, b, c, d = 0, 0, 0, 0
    accumulated = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    number = sequence_number * H + head if cu_seqlens is None else head
    if SPLIT and HAS_LEFT:
        accumulated, total, largest = _attend(
            accumulated, total, largest, q_block, i, a, b,
            k, v, k_plane, v_plane, z, kv_head, stride_kt, stride_vt, columns_here, diagonal, left, right,
            scale, cap, slope, rng_state, threshold, number, first,
            UNIT, D, D_PADDED, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes is not None, FOLD, ALIGNED, PRECISION,
            DESCRIPTORS, True, BLOCK_N,
        )  # fmt: skip
    if SPLIT:
        accumulated, total, largest = _attend(
            accumulated, total, largest, q_block, i, b, c,
            k, v, k_plane, v_plane, z, kv_head, stride_kt, stride_vt, columns_here, diagonal, left, right,
            scale, cap, slope, rng_state, threshold, number, first,
            UNIT, D, D_PADDED, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes is not None, FOLD, ALIGNED, PRECISION,
            DESCRIPTORS, False, BLOCK_N,
        )  # fmt: skip
    accumulated, total, largest = _attend(
        accumulated, total, largest, q_block, i, c if SPLIT else a, d,
        k, v, k_plane, v_plane, z, kv_head, stride_kt, stride_vt, columns_here, diagonal, left, right,
        scale, cap, slope, rng_state, threshold, number, first,
        UNIT, D, D_PADDED, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes is not None, FOLD, ALIGNED, PRECISION,
        DESCRIPTORS, True, BLOCK_N,
    )  # fmt: skip

    shift = tl.where(largest == -float("inf"), 0.0, largest)
    empty = total == 0
    result = accumulated * (keep_scale / tl.where(empty, 1.0, total))[:, None]
    out_plane = plane(out, z, head, first, tl.cast(rows, tl.int64) * (H * D), D, H * D, 1, False)
    store_rows(out_plane, result, start, rows_here, H * D, D, D_PADDED, BLOCK_M)
    lse_row = (tl.cast(z, tl.int64) * H + head) * rows + first
    tl.store(lse + lse_row + i, (shift + tl.log2(total)) / LOG2_E, mask=i < rows_here)
