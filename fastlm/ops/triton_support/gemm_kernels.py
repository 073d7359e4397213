"""What the kernels with a matrix product share: the order of the tiles, and the loop over k.

Half precision only; the sum is in float32. In float32 the ops leave products to PyTorch's library.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of_program(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The tile (row, column) that this program computes: GROUP rows of tiles at a time, so that neighbours in time read
    the same part of b while it is in the cache."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = GROUP * tiles_n
    first = program // group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + program % group % height, program % group // height


@triton.jit
def product(
    a,  # stored (M, K) where A_ROWS, else (K, M); its rows a_stride apart. With TMA: a tensor descriptor
    b,  # stored (N, K) where B_ROWS, else (K, N); likewise
    tile_m,
    tile_n,
    second,  # GATED: the distance of the second half of b's N
    M,
    N,
    K,
    a_stride,
    b_stride,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides K
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Two tiles (BM, BN) of a @ b: that at the given place, and, where GATED, the one `second` further in N."""
    total = tl.zeros((BM, BN), dtype=tl.float32)
    gated = tl.zeros((BM, BN), dtype=tl.float32)
    if TMA:
        start_m, start_n = tile_m * BM, tile_n * BN
        for k in range(0, K, BK):
            left = a.load([start_m, k]) if A_ROWS else a.load([k, start_m]).T
            right = b.load([start_n, k]).T if B_ROWS else b.load([k, start_n])
            total = tl.dot(left, right, total)
            if GATED:
                up = b.load([start_n + second, k]).T if B_ROWS else b.load([k, start_n + second])
                gated = tl.dot(left, up, gated)
    else:
        m = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
        n = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        a += (m[:, None] * a_stride + k[None, :]) if A_ROWS else (m[:, None] + k[None, :].to(tl.int64) * a_stride)
        b += (n[None, :] * b_stride + k[:, None]) if B_ROWS else (n[None, :] + k[:, None].to(tl.int64) * b_stride)
        a_step = BK if A_ROWS else a_stride * BK
        b_step = BK if B_ROWS else b_stride * BK
        if GATED:
            b_second = second.to(tl.int64) * b_stride if B_ROWS else second.to(tl.int64)
        inside_a, inside_b = (m < M)[:, None], (n < N)[None, :]
        for start in range(0, K, BK):
            mask_a, mask_b = inside_a, inside_b
            if not EVEN:
                mask_a = inside_a & (k < K - start)[None, :]
                mask_b = inside_b & (k < K - start)[:, None]
            left = tl.load(a, mask=mask_a, other=0.0)
            total = tl.dot(left, tl.load(b, mask=mask_b, other=0.0), total)
            if GATED:
                gated = tl.dot(left, tl.load(b + b_second, mask=mask_b, other=0.0), gated)
            a += a_step
            b += b_step
    return total, gated
