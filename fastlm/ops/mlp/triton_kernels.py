"""The kernels of the MLP block: matrix products with the bias and the activation in their epilogue, and the elementwise
passes alone, for what PyTorch's library has multiplied."""

import triton
import triton.language as tl

from fastlm.ops.triton_support.gemm_kernels import product, tile_of_program

# 1.5957691216057308 = 2 sqrt(2 / pi), 0.7071067811865476 = 1 / sqrt(2), 0.3989422804014327 = 1 / sqrt(2 pi). They stand
# as literals below, because the interpreter cannot multiply a constexpr by a tensor.


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """act(h), float32; the activation of the gate where it is gated."""
    if ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(u)) = sigmoid(2u)
        result = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        result = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "silu" or ACTIVATION == "swiglu":
        result = h * tl.sigmoid(h)
    elif ACTIVATION == "relu2":
        result = tl.where(h > 0.0, h * h, 0.0)
    else:
        result = tl.where(h > 0.0, h, 0.0)
    return result


@triton.jit
def slope(h, ACTIVATION: tl.constexpr):
    """act'(h), float32."""
    if ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        result = s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        result = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "silu" or ACTIVATION == "swiglu":
        s = tl.sigmoid(h)
        result = s * (1.0 + h * (1.0 - s))
    elif ACTIVATION == "relu2":
        result = tl.where(h > 0.0, 2.0 * h, 0.0)
    else:
        result = tl.where(h > 0.0, 1.0, 0.0)
    return result


@triton.jit(do_not_specialize=["M"])
def linear_act(
    x,  # (M, K)
    weight,  # (N, K), gated (2N, K), where B_ROWS; else its transpose
    bias,  # (N), gated (2N), or None
    hidden,  # (M, N), contiguous: act(x @ weight.T + bias)
    pre,  # (M, N), gated (M, 2N), contiguous: the pre-activation; None where it is not kept
    M: tl.int64,
    N: tl.int32,
    K: tl.int32,
    x_stride: tl.int64,
    weight_stride: tl.int64,
    B_ROWS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    tile_m, tile_n = tile_of_program(M.to(tl.int32), N, BM, BN, GROUP)
    total, gated = product(
        x, weight, tile_m, tile_n, N, M, N, K, x_stride, weight_stride, True, B_ROWS, GATED, EVEN, TMA, BM, BN, BK
    )
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    first_m, n = tile_m.to(tl.int64) * BM, tile_n * BN + column
    inside = (first_m + row < M)[:, None] & (n < N)[None, :]
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gated += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        width = 2 * N if GATED else N
        place = pre + first_m * width + tile_n * BN + (row[:, None] * width + column[None, :])
        tl.store(place, total.to(pre.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(place + N, gated.to(pre.dtype.element_ty), mask=inside)
    result = activate(total, ACTIVATION)
    if GATED:
        result *= gated
    place = hidden + first_m * N + tile_n * BN + (row[:, None] * N + column[None, :])
    tl.store(place, result.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _finish_backward(
    dhidden,
    pre,
    dpre,
    hidden,
    partial,
    tile_m,
    tile_n,
    M,
    N,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """From a tile of the activation's gradient: that of the pre-activation, its column sums, the activation again."""
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    first_m, n = tile_m.to(tl.int64) * BM, tile_n * BN + column
    inside = (first_m + row < M)[:, None] & (n < N)[None, :]
    width = 2 * N if GATED else N
    start = first_m * width + tile_n * BN  # 64 bits for the tile, 32 within it
    place = row[:, None] * width + column[None, :]
    hidden_place = first_m * N + tile_n * BN + (row[:, None] * N + column[None, :])
    partial_place = tile_m.to(tl.int64) * width + n
    h = tl.load(pre + start + place, mask=inside, other=0.0).to(tl.float32)
    dgate = dhidden * slope(h, ACTIVATION)
    if GATED:
        up = tl.load(pre + (start + N) + place, mask=inside, other=0.0).to(tl.float32)
        act = activate(h, ACTIVATION)
        dgate *= up
        dup = tl.where(inside, dhidden * act, 0.0)
        tl.store(dpre + (start + N) + place, dup.to(dpre.dtype.element_ty), mask=inside)
        if partial is not None:
            tl.store(partial + N + partial_place, tl.sum(dup, axis=0), mask=n < N)
        if hidden is not None:
            tl.store(hidden + hidden_place, (act * up).to(hidden.dtype.element_ty), mask=inside)
    elif hidden is not None:
        tl.store(hidden + hidden_place, activate(h, ACTIVATION).to(hidden.dtype.element_ty), mask=inside)
    tl.store(dpre + start + place, dgate.to(dpre.dtype.element_ty), mask=inside)
    if partial is not None:
        tl.store(partial + partial_place, tl.sum(tl.where(inside, dgate, 0.0), axis=0), mask=n < N)


@triton.jit(do_not_specialize=["M"])
def linear_act_backward(
    dy,  # (M, K): the gradient behind the second matrix
    weight,  # (K, N) where not B_ROWS, else its transpose: the second matrix
    pre,  # (M, N), gated (M, 2N), contiguous
    dpre,  # as pre
    hidden,  # (M, N), contiguous: the activation once more; None where nobody asks
    partial,  # (tiles of rows, N), gated (…, 2N), float32: the column sums of dpre; None where nobody asks
    M: tl.int64,
    N: tl.int32,
    K: tl.int32,
    dy_stride: tl.int64,
    weight_stride: tl.int64,
    B_ROWS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    tile_m, tile_n = tile_of_program(M.to(tl.int32), N, BM, BN, GROUP)
    dhidden, _ = product(
        dy, weight, tile_m, tile_n, N, M, N, K, dy_stride, weight_stride, True, B_ROWS, False, EVEN, TMA, BM, BN, BK
    )
    _finish_backward(dhidden, pre, dpre, hidden, partial, tile_m, tile_n, M, N, GATED, ACTIVATION, BM, BN)


@triton.jit(do_not_specialize=["M"])
def act(
    pre,  # (M, N), gated (M, 2N), contiguous
    hidden,  # (M, N), contiguous
    M: tl.int64,
    N: tl.int32,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = pre + m[:, None] * (2 * N if GATED else N) + n[None, :]
    result = activate(tl.load(place, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        result *= tl.load(place + N, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden + m[:, None] * N + n[None, :], result.to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def act_backward(
    dhidden,  # (M, N), rows dhidden_stride apart
    pre,  # (M, N), gated (M, 2N), contiguous
    dpre,  # as pre
    hidden,  # (M, N), contiguous, or None
    partial,  # (tiles of rows, N), gated (…, 2N), float32, or None
    M: tl.int64,
    N: tl.int32,
    dhidden_stride: tl.int64,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    upstream = tl.load(dhidden + m[:, None] * dhidden_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    _finish_backward(upstream, pre, dpre, hidden, partial, tile_m, tile_n, M, N, GATED, ACTIVATION, BM, BN)
