"""The kernels of linear_cross_entropy: a block of logits becomes the loss and, in place, its gradient."""

import triton
import triton.language as tl

from fastlm.ops.triton_support.gemm_kernels import product, tile_of_program


@triton.jit
def _capped(z, softcap, CAPPED: tl.constexpr):
    """softcap * tanh(z / softcap), where there is a soft cap; tanh(u) = 2 sigmoid(2u) - 1."""
    if CAPPED:
        z = softcap * (2.0 * tl.sigmoid(2.0 * (z / softcap)) - 1.0)
    return z


@triton.jit(do_not_specialize=["ignore_index", "smoothing", "z_loss", "softcap"])
def softmax_loss(
    logits,  # (rows, vocabulary), contiguous; overwritten by the gradient where GRADIENT
    targets,  # (rows) int64
    dloss,  # (rows) the rows' upstream gradients, or None: 1
    divisor,  # (1) float32: by which every row's gradient is divided, or None: 1
    loss,  # (rows) float32, or None: lse is read instead of made
    lse,  # (rows) float32
    vocabulary: tl.int32,
    dloss_stride: tl.int64,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    z_loss: tl.float32,
    softcap: tl.float32,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a row: once over the logits for their maximum and sum, once more, from the cache, for the gradient."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * vocabulary
    column = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    ignored = target == ignore_index
    outside = (target < 0) | (target >= vocabulary)
    if ignored:
        if loss is not None:
            tl.store(loss + row, 0.0)
            tl.store(lse + row, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                zero = tl.zeros((BLOCK,), dtype=logits.dtype.element_ty)
                tl.store(line + start + column, zero, mask=start + column < vocabulary)
    else:
        # A target outside of the vocabulary cannot be reported without waiting: its loss and gradient are NaN.
        scale = tl.where(outside, float("nan"), 1.0)
        if loss is not None:
            highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            sum_of_logits = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, vocabulary, BLOCK):
                inside = start + column < vocabulary
                z = _capped(tl.load(line + start + column, mask=inside, other=0.0).to(tl.float32), softcap, CAPPED)
                sum_of_logits += tl.where(inside, z, 0.0)
                new = tl.maximum(highest, tl.where(inside, z, float("-inf")))
                # Each lane has its own maximum, which is -inf until it has seen a column.
                seen = new > float("-inf")
                total = tl.where(seen, total * tl.exp(highest - new) + tl.where(inside, tl.exp(z - new), 0.0), 0.0)
                highest = new
            maximum = tl.max(highest, axis=0)
            sums = tl.sum(tl.where(highest > float("-inf"), total * tl.exp(highest - maximum), 0.0), axis=0)
            log_sum = maximum + tl.log(sums)
            at_target = tl.load(line + tl.where(outside, 0, target)).to(tl.float32)
            at_target = _capped(at_target, softcap, CAPPED)
            mean = tl.sum(sum_of_logits, axis=0) / vocabulary
            value = (1.0 - smoothing) * (log_sum - at_target) + smoothing * (log_sum - mean)
            value += z_loss * log_sum * log_sum
            tl.store(loss + row, value * scale)
            tl.store(lse + row, log_sum)
        else:
            log_sum = tl.load(lse + row)
            maximum = log_sum
            sums = 1.0
        if GRADIENT:
            if dloss is not None:
                scale *= tl.load(dloss + row * dloss_stride)
            if divisor is not None:
                scale /= tl.load(divisor)
            # exp(z - maximum) / sums: of large logits it has digits that exp(z - log_sum) loses.
            softmax_scale = (1.0 + 2.0 * z_loss * log_sum) / sums
            # All threads have read the target's logit before one overwrites it.
            tl.debug_barrier()
            for start in range(0, vocabulary, BLOCK):
                inside = start + column < vocabulary
                z = _capped(tl.load(line + start + column, mask=inside, other=0.0).to(tl.float32), softcap, CAPPED)
                d = tl.exp(z - maximum) * softmax_scale - smoothing / vocabulary
                d = tl.where(start + column == target, d - (1.0 - smoothing), d)
                if CAPPED:
                    d *= 1.0 - (z / softcap) * (z / softcap)
                tl.store(line + start + column, (d * scale).to(logits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["K", "first"])
def accumulate(
    a,  # (K, M): the block's gradients of the logits, rows a_stride apart
    b,  # (K, N): the block's rows of x
    total,  # (M, N) float32, contiguous
    divisor,  # (1) float32: by which the product is divided, or None
    M: tl.int32,
    N: tl.int32,
    K: tl.int32,
    a_stride: tl.int64,
    b_stride: tl.int64,
    first: tl.int32,  # 1: total is written, 0: added to
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """total (+)= a.T @ b / divisor: the weight's gradient, in float32 from block to block."""
    tile_m, tile_n = tile_of_program(M, N, BM, BN, GROUP)
    result, _ = product(
        a, b, tile_m, tile_n, 0, M, N, K, a_stride, b_stride, False, False, False, EVEN, TMA, BM, BN, BK
    )
    m = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = total + m[:, None] * N + n[None, :]
    if divisor is not None:
        result /= tl.load(divisor)
    if first == 0:
        result += tl.load(place, mask=inside, other=0.0)
    tl.store(place, result, mask=inside)
