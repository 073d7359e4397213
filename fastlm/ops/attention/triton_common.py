"""What the forward and backward kernels of attention share: positions, scores, masks, dropout.

Scores are kept in base 2: log2(e) is folded into the scale, so that the softmax takes exp2, which is one instruction.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence(cu_seqlens, z, rows, columns):
    """(batch entry, first row, rows, columns) of sequence z: a batch entry, or one of those packed into entry 0."""
    if cu_seqlens is None:
        return z, 0, rows, columns
    else:
        first = tl.load(cu_seqlens + z)
        length = tl.load(cu_seqlens + z + 1) - first
        return 0, first, length, length


@triton.jit
def plane(base, z, h, first, stride_z, stride_h, stride_t, UNIT: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Where the rows of one head of one sequence begin. Strides count UNIT elements: a divisor known to the compiler.

    A descriptor stays as it is: `read` finds the rows in it.
    """
    if DESCRIPTORS:
        return base
    else:
        z, h, first = tl.cast(z, tl.int64), tl.cast(h, tl.int64), tl.cast(first, tl.int64)
        return base + (z * stride_z + h * stride_h + first * stride_t) * UNIT


@triton.jit
def load_rows(
    base, start, length, stride, UNIT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + BLOCK of a plane (BLOCK, D_PADDED): zeros beyond D, and beyond `length` where BOUNDED."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, D_PADDED)
    pointers = base + tl.cast(start, tl.int64) * stride * UNIT + (i[:, None] * (stride * UNIT) + d[None, :])
    if BOUNDED and D < D_PADDED:
        return tl.load(pointers, mask=(i + start < length)[:, None] & (d < D)[None, :], other=0.0)
    elif BOUNDED:
        return tl.load(pointers, mask=(i + start < length)[:, None], other=0.0)
    elif D < D_PADDED:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def read(
    source, base, z, start, head, length, stride, UNIT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, BOUNDED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """`load_rows`, by the TMA where `source` is a descriptor of the whole tensor (which is always bounded)."""
    if DESCRIPTORS:
        return source.load([z, start, head, 0]).reshape(BLOCK, D_PADDED)
    else:
        return load_rows(base, start, length, stride, UNIT, BLOCK, D, D_PADDED, BOUNDED)


@triton.jit
def store_rows(
    base, values, start, length, stride, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """values (BLOCK, D_PADDED) into rows start .. start + BLOCK of a plane with contiguous rows."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, D_PADDED)
    pointers = base + tl.cast(start, tl.int64) * stride + (i[:, None] * stride + d[None, :])
    tl.store(pointers, values.to(base.dtype.element_ty), mask=(i + start < length)[:, None] & (d < D)[None, :])


@triton.jit
def columns_of_rows(
    first_row, last_row, columns, diagonal, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):  # fmt: skip
    """Columns that rows first_row .. last_row (inclusive) see: any row from, every row from, every row to, any row to.

    Row i sees column j where i + diagonal - left <= j <= i + diagonal + right; `to` is exclusive.
    """
    some_low, all_low, all_high, some_high = 0, 0, columns, columns
    if HAS_LEFT:
        some_low = tl.maximum(first_row + diagonal - left, 0)
        all_low = tl.maximum(last_row + diagonal - left, 0)
    if HAS_RIGHT:
        some_high = tl.minimum(tl.maximum(last_row + diagonal + right + 1, 0), columns)
        all_high = tl.minimum(tl.maximum(first_row + diagonal + right + 1, 0), columns)
    return some_low, all_low, all_high, some_high


@triton.jit
def phases(some_low, all_low, all_high, some_high, BLOCK: tl.constexpr):
    """The bounds of three loops over blocks: masked from a, whole from b, masked from c to d. BLOCK divides a, b, c."""
    a = some_low // BLOCK * BLOCK
    d = tl.maximum(some_high, a)
    b = tl.minimum(tl.maximum((all_low + BLOCK - 1) // BLOCK * BLOCK, a), (d + BLOCK - 1) // BLOCK * BLOCK)
    c = tl.maximum(all_high // BLOCK * BLOCK, b)
    return a, b, c, d


@triton.jit
def visible(i, j, columns, diagonal, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether rows i see columns j (of shapes that broadcast)."""
    seen = j < columns
    if HAS_LEFT:
        seen = seen & (j >= i + (diagonal - left))
    if HAS_RIGHT:
        seen = seen & (j <= i + (diagonal + right))
    return seen


@triton.jit
def tanh(x):
    """Accurate in float32 relative to the result, also near 0, where the quotient alone would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    quotient = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.25, series, quotient)


@triton.jit
def score(products, i, j, diagonal, slope, scale, cap, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Base-2 scores of q @ k^T, and tanh of the softcap (the scores again without one).

    scale: times log2(e) without a softcap; over the softcap with one. cap: the softcap times log2(e).
    """
    scores = products * scale
    capped = scores
    if SOFTCAP:
        capped = tanh(scores)
        scores = capped * cap
    if ALIBI:
        scores -= slope * tl.abs(i + diagonal - j).to(tl.float32)
    return scores, capped


@triton.jit
def keep(
    rng_state, threshold, number, first, i, start, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The dropout mask of fastlm.ops.philox for rows i and BLOCK columns from `start` of plane `number`.

    `first`: added to positions in a sequence (rows and columns alike) to get those in the packed tensors.
    Four columns share a counter. Where blocks of columns begin at a multiple of four (ALIGNED), it is computed once.
    """
    seed, offset = tl.load(rng_state), (tl.load(rng_state + 1) & 0xFFFFFFFF).to(tl.uint32)
    row = (i + first).to(tl.uint32)[:, None]
    number = tl.cast(number, tl.uint32)
    if ALIGNED:
        group = ((start + first) // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, row, group, number, offset)
        k0, k1 = (w0 >= threshold).to(tl.int8), (w1 >= threshold).to(tl.int8)
        k2, k3 = (w2 >= threshold).to(tl.int8), (w3 >= threshold).to(tl.int8)
        kept = tl.join(tl.join(k0, k2), tl.join(k1, k3)).reshape(i.shape[0], BLOCK)
    else:
        column = (start + first + tl.arange(0, BLOCK)).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, row, column // 4, number, offset)
        word = column % 4
        word = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        kept = (word >= threshold).to(tl.int8)
    if TRANSPOSED:
        kept = tl.trans(kept)
    return kept != 0
