"""The backward kernels of attention in Triton (FlashAttention-2): row terms, then dk and dv, then dq.

Each gradient has one writer and one order of summation: no atomics, and two runs are equal to the bit.
With P the softmax, dP = dout @ v^T and dS = P * (dP - delta + dlse), where delta is the row sum of dout * out:
dv = P^T @ dout, dk = scale * dS^T @ q, dq = scale * dS @ k.
"""

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


@triton.jit(do_not_specialize=["stride_z", "stride_t", "stride_h", "rows", "blocks"])
def row_terms(
    out, dout, lse, dlse,  # (B, T, H, D) contiguous, (B, T, H, D), (B, H, T), (B, H, T) or None
    lse2, delta,  # (B, H, T) float32, written: lse in base 2, and the row sums of dout * out less dlse
    stride_z: tl.int64, stride_t: tl.int32, stride_h: tl.int64, rows: tl.int32, blocks: tl.int32,
    H: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What dS needs of each row. Grid: blocks * H * B."""
    program = tl.program_id(0)
    start = program % blocks * BLOCK_M
    head = program // blocks % H
    z = program // blocks // H
    i = start + tl.arange(0, BLOCK_M)
    out_plane = plane(out, z, head, 0, tl.cast(rows, tl.int64) * (H * D), D, H * D, 1, False)
    o = load_rows(out_plane, start, rows, H * D, 1, BLOCK_M, D, D_PADDED, True)
    dout_plane = plane(dout, z, head, 0, stride_z, stride_h, stride_t, UNIT, False)
    do = load_rows(dout_plane, start, rows, stride_t, UNIT, BLOCK_M, D, D_PADDED, True)
    terms = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = (tl.cast(z, tl.int64) * H + head) * rows + i
    if dlse is not None:
        terms -= tl.load(dlse + row, mask=i < rows, other=0.0)
    base2 = tl.load(lse + row, mask=i < rows, other=0.0) * LOG2_E
    # A row that sees nothing: its scores are -inf, and exp2(-inf - 0) is 0 where exp2(-inf + inf) is NaN.
    tl.store(lse2 + row, tl.where(base2 == -float("inf"), 0.0, base2), mask=i < rows)
    tl.store(delta + row, terms, mask=i < rows)


@triton.jit
def _gradients_of_block(
    dk, dv, k, v, j, j_start, begin, end, q_source, dout_source, q_plane, dout_plane, z, head, stride_qt, stride_dt,
    lse2, delta,
    rows, columns, diagonal, left, right, scale, cap, slope, rng_state, threshold, keep_scale, number, first,
    UNIT: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What rows begin .. end add to dk and dv of a block of columns. Everything is transposed: (columns, rows)."""
    for start in tl.range(begin, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        q = read(
            q_source, q_plane, z, start, head, rows, stride_qt, UNIT, BLOCK_M, D, D_PADDED, True, DESCRIPTORS
        )  # fmt: skip
        shift = tl.load(lse2 + i, mask=i < rows, other=float("inf"))  # beyond the last row every weight is 0
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        scores, capped = score(products, i[None, :], j[:, None], diagonal, slope, scale, cap, SOFTCAP, ALIBI)
        weights = tl.exp2(scores - shift[None, :])
        if MASKED:
            seen = visible(i[None, :], j[:, None], columns, diagonal, left, right, HAS_LEFT, HAS_RIGHT)
            weights = tl.where(seen, weights, 0.0)
        do = read(
            dout_source, dout_plane, z, start, head, rows, stride_dt, UNIT, BLOCK_M, D, D_PADDED, True, DESCRIPTORS
        )  # fmt: skip
        dweights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dropped = weights
        if rng_state is not None:
            kept = keep(rng_state, threshold, number, first, i, j_start, True, ALIGNED, BLOCK_N)
            dropped = tl.where(kept, weights, 0.0)
            dweights = tl.where(kept, dweights * keep_scale, 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        dscores = weights * (dweights - tl.load(delta + i, mask=i < rows, other=0.0)[None, :])
        if SOFTCAP:
            dscores *= 1.0 - capped * capped
        if MASKED:
            dscores = tl.where(seen, dscores, 0.0)
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "stride_qz", "stride_qt", "stride_qh", "stride_kz", "stride_kt", "stride_kh", "stride_vz", "stride_vt",
        "stride_vh", "stride_dz", "stride_dt", "stride_dh", "slopes_stride", "blocks", "rows", "columns", "left",
        "right",
    ]
)  # fmt: skip
def columns_backward(
    q, k, v, dout,  # (B, T, H, D), (B, S, H_kv, D) twice, (B, T, H, D); q, dout: or DESCRIPTORS
    lse2, delta,  # (B, H, T)
    dk, dv,  # (B, S, H_kv, D); the heads of a token lie together, and ROW elements further those of the next
    slopes, cu_seqlens, rng_state,
    stride_qz: tl.int64, stride_qt: tl.int32, stride_qh: tl.int64,
    stride_kz: tl.int64, stride_kt: tl.int32, stride_kh: tl.int64,
    stride_vz: tl.int64, stride_vt: tl.int32, stride_vh: tl.int64,
    stride_dz: tl.int64, stride_dt: tl.int32, stride_dh: tl.int64,  # of dout
    slopes_stride: tl.int32, blocks: tl.int32,  # of columns in the longest sequence
    rows: tl.int32, columns: tl.int32, left: tl.int32, right: tl.int32,
    scale: tl.float32, cap: tl.float32, final_scale: tl.float32, threshold: tl.uint32, keep_scale: tl.float32,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, UNIT: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of columns of one head of k and v, over the rows of its group of heads, in order.

    Grid: blocks * H_kv * sequences; the first columns first (where causal, they have the most to do).
    """
    HEADS: tl.constexpr = H // GROUP
    program = tl.program_id(0)
    start = program % blocks * BLOCK_N
    kv_head = program // blocks % HEADS
    sequence_number = program // blocks // HEADS
    z, first, rows_here, columns_here = sequence(cu_seqlens, sequence_number, rows, columns)
    diagonal = columns_here - rows_here
    j = start + tl.arange(0, BLOCK_N)
    k_plane = plane(k, z, kv_head, first, stride_kz, stride_kh, stride_kt, UNIT, False)
    v_plane = plane(v, z, kv_head, first, stride_vz, stride_vh, stride_vt, UNIT, False)
    k_block = load_rows(k_plane, start, columns_here, stride_kt, UNIT, BLOCK_N, D, D_PADDED, True)
    v_block = load_rows(v_plane, start, columns_here, stride_vt, UNIT, BLOCK_N, D, D_PADDED, True)

    # Rows that see a column: the same bounds with rows and columns, left and right exchanged. Columns beyond the last
    # need no mask: nothing of theirs is stored.
    last = tl.minimum(start + BLOCK_N, columns_here) - 1
    bounds = columns_of_rows(start, last, rows_here, -diagonal, right, left, HAS_RIGHT, HAS_LEFT)
    a, b, c, d = phases(bounds[0], bounds[1], bounds[2], bounds[3], BLOCK_M)
    if not HAS_LEFT:
        c = tl.maximum(d, b)  # nor do rows beyond the last need one
    if start >= columns_here:
        a, b, c, d = 0, 0, 0, 0
    dk_block = tl.zeros((BLOCK_N, D_PADDED), tl.float32)
    dv_block = tl.zeros((BLOCK_N, D_PADDED), tl.float32)
    for head in tl.range(kv_head * GROUP, kv_head * GROUP + GROUP):
        q_plane = plane(q, z, head, first, stride_qz, stride_qh, stride_qt, UNIT, DESCRIPTORS)
        dout_plane = plane(dout, z, head, first, stride_dz, stride_dh, stride_dt, UNIT, DESCRIPTORS)
        row = (tl.cast(z, tl.int64) * H + head) * rows + first
        slope = 0.0
        if slopes is not None:
            slope = tl.load(slopes + z * slopes_stride + head)
        number = sequence_number * H + head if cu_seqlens is None else head
        if SPLIT and HAS_RIGHT:
            dk_block, dv_block = _gradients_of_block(
                dk_block, dv_block, k_block, v_block, j, start, a, b, q, dout, q_plane, dout_plane, z, head,
                stride_qt, stride_dt, lse2 + row, delta + row, rows_here, columns_here, diagonal, left, right,
                scale, cap, slope, rng_state, threshold, keep_scale, number, first,
                UNIT, D, D_PADDED, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes is not None, ALIGNED, PRECISION,
                True, DESCRIPTORS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if SPLIT:
            dk_block, dv_block = _gradients_of_block(
                dk_block, dv_block, k_block, v_block, j, start, b, c, q, dout, q_plane, dout_plane, z, head,
                stride_qt, stride_dt, lse2 + row, delta + row, rows_here, columns_here, diagonal, left, right,
                scale, cap, slope, rng_state, threshold, keep_scale, number, first,
                UNIT, D, D_PADDED, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes is not None, ALIGNED, PRECISION,
                False, DESCRIPTORS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if HAS_LEFT or not SPLIT:
            dk_block, dv_block = _gradients_of_block(
                dk_block, dv_block, k_block, v_block, j, start, c if SPLIT else a, d,
                q, dout, q_plane, dout_plane, z, head,
                stride_qt, stride_dt, lse2 + row, delta + row, rows_here, columns_here, diagonal, left, right,
                scale, cap, slope, rng_state, threshold, keep_scale, number, first,
                UNIT, D, D_PADDED, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes is not None, ALIGNED, PRECISION,
                True, DESCRIPTORS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    stride_z = tl.cast(columns, tl.int64) * ROW
    dk_plane = plane(dk, z, kv_head, first, stride_z, D, ROW, 1, False)
    dv_plane = plane(dv, z, kv_head, first, stride_z, D, ROW, 1, False)
    store_rows(dk_plane, dk_block * final_scale, start, columns_here, ROW, D, D_PADDED, BLOCK_N)
    store_rows(dv_plane, dv_block * keep_scale, start, columns_here, ROW, D, D_PADDED, BLOCK_N)


@triton.jit
def _gradient_of_rows(
    dq, q, do, i, shift, term, begin, end, k_source, v_source, k_plane, v_plane, z, kv_head,
    stride_kt, stride_vt, columns, diagonal, left, right, scale, cap, slope,
    rng_state, threshold, keep_scale, number, first,
    UNIT: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What columns begin .. end add to dq of a block of rows."""
    for start in tl.range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :]
        k = read(
            k_source, k_plane, z, start, kv_head, columns, stride_kt, UNIT, BLOCK_N, D, D_PADDED, MASKED, DESCRIPTORS
        )  # fmt: skip
        v = read(
            v_source, v_plane, z, start, kv_head, columns, stride_vt, UNIT, BLOCK_N, D, D_PADDED, MASKED, DESCRIPTORS
        )  # fmt: skip
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        scores, capped = score(products, i[:, None], j, diagonal, slope, scale, cap, SOFTCAP, ALIBI)
        weights = tl.exp2(scores - shift[:, None])
        dweights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if rng_state is not None:
            kept = keep(rng_state, threshold, number, first, i, start, False, ALIGNED, BLOCK_N)
            dweights = tl.where(kept, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - term[:, None])
        if SOFTCAP:
            dscores *= 1.0 - capped * capped
        if MASKED:
            seen = visible(i[:, None], j, columns, diagonal, left, right, HAS_LEFT, HAS_RIGHT)
            dscores = tl.where(seen, dscores, 0.0)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(
    do_not_specialize=[
        "stride_qz", "stride_qt", "stride_qh", "stride_kz", "stride_kt", "stride_kh", "stride_vz", "stride_vt",
        "stride_vh", "stride_dz", "stride_dt", "stride_dh", "slopes_stride", "blocks", "rows", "columns", "left",
        "right",
    ]
)  # fmt: skip
def rows_backward(
    q, k, v, dout,  # (B, T, H, D), (B, S, H_kv, D) twice, (B, T, H, D); k, v: or DESCRIPTORS
    lse2, delta,  # (B, H, T)
    dq,  # (B, T, H, D); the heads of a token lie together, and ROW elements further those of the next
    slopes, cu_seqlens, rng_state,
    stride_qz: tl.int64, stride_qt: tl.int32, stride_qh: tl.int64,
    stride_kz: tl.int64, stride_kt: tl.int32, stride_kh: tl.int64,
    stride_vz: tl.int64, stride_vt: tl.int32, stride_vh: tl.int64,
    stride_dz: tl.int64, stride_dt: tl.int32, stride_dh: tl.int64,  # of dout
    slopes_stride: tl.int32, blocks: tl.int32,  # of rows in the longest sequence
    rows: tl.int32, columns: tl.int32, left: tl.int32, right: tl.int32,
    scale: tl.float32, cap: tl.float32, final_scale: tl.float32, threshold: tl.uint32, keep_scale: tl.float32,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, UNIT: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of rows of one head. The grid is that of the forward kernel."""
    program = tl.program_id(0)
    start = (blocks - 1 - program % blocks) * BLOCK_M
    head = program // blocks % H
    sequence_number = program // blocks // H
    z, first, rows_here, columns_here = sequence(cu_seqlens, sequence_number, rows, columns)
    diagonal = columns_here - rows_here
    kv_head = head // GROUP
    i = start + tl.arange(0, BLOCK_M)
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + z * slopes_stride + head)
    number = sequence_number * H + head if cu_seqlens is None else head
    q_plane = plane(q, z, head, first, stride_qz, stride_qh, stride_qt, UNIT, False)
    dout_plane = plane(dout, z, head, first, stride_dz, stride_dh, stride_dt, UNIT, False)
    k_plane = plane(k, z, kv_head, first, stride_kz, stride_kh, stride_kt, UNIT, DESCRIPTORS)
    v_plane = plane(v, z, kv_head, first, stride_vz, stride_vh, stride_vt, UNIT, DESCRIPTORS)
    q_block = load_rows(q_plane, start, rows_here, stride_qt, UNIT, BLOCK_M, D, D_PADDED, True)
    do = load_rows(dout_plane, start, rows_here, stride_dt, UNIT, BLOCK_M, D, D_PADDED, True)
    row = (tl.cast(z, tl.int64) * H + head) * rows + first
    shift = tl.load(lse2 + row + i, mask=i < rows_here, other=float("inf"))
    term = tl.load(delta + row + i, mask=i < rows_here, other=0.0)

    last = tl.minimum(start + BLOCK_M, rows_here) - 1
    bounds = columns_of_rows(start, last, columns_here, diagonal, left, right, HAS_LEFT, HAS_RIGHT)
    a, b, c, d = phases(bounds[0], bounds[1], bounds[2], bounds[3], BLOCK_N)
    if start >= rows_here:
        a, b, c, d = 0, 0, 0, 0
    dq_block = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    if SPLIT and HAS_LEFT:
        dq_block = _gradient_of_rows(
            dq_block, q_block, do, i, shift, term, a, b, k, v, k_plane, v_plane, z, kv_head,
            stride_kt, stride_vt, columns_here, diagonal, left, right, scale, cap, slope,
            rng_state, threshold, keep_scale, number, first,
            UNIT, D, D_PADDED, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes is not None, ALIGNED, PRECISION,
            True, DESCRIPTORS, BLOCK_N,
        )  # fmt: skip
    if SPLIT:
        dq_block = _gradient_of_rows(
            dq_block, q_block, do, i, shift, term, b, c, k, v, k_plane, v_plane, z, kv_head,
            stride_kt, stride_vt, columns_here, diagonal, left, right, scale, cap, slope,
            rng_state, threshold, keep_scale, number, first,
            UNIT, D, D_PADDED, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes is not None, ALIGNED, PRECISION,
            False, DESCRIPTORS, BLOCK_N,
        )  # fmt: skip
    dq_block = _gradient_of_rows(
        dq_block, q_block, do, i, shift, term, c if SPLIT else a, d, k, v, k_plane, v_plane, z, kv_head,
        stride_kt, stride_vt, columns_here, diagonal, left, right, scale, cap, slope,
        rng_state, threshold, keep_scale, number, first,
        UNIT, D, D_PADDED, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes is not None, ALIGNED, PRECISION,
        True, DESCRIPTORS, BLOCK_N,
    )  # fmt: skip
    dq_plane = plane(dq, z, head, first, tl.cast(rows, tl.int64) * ROW, D, ROW, 1, False)
    store_rows(dq_plane, dq_block * final_scale, start, rows_here, ROW, D, D_PADDED, BLOCK_M)
