"""Matrix products on the CPU: PyTorch's library in the way that is fastest on this processor, and our own kernels
(csrc/linear): for a layer's weights and so few rows that the library's copies of the weights cost more than they bring,
and for large products where the library is MKL and the processor AMD's.

Few processors can multiply numbers of 16 bits. On the others the library's products of bfloat16 reach a quarter of
float32's rate and those of float16 a twelfth (1024 x 768 x 3072 on two cores of a Cascade Lake Xeon: 100 and 273 ms;
float32 19). There the operands are converted to float32, in pieces that bound the memory, and multiplied as such: the
products are exact, the sums float32's, and only the result is rounded. The bits of that do not follow the number of
threads (`mkl.py`), as the library's of 16 bits do.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

from fastlm.ops import memory, mkl, native

# Bytes of a piece in float32, of each operand and of the result: small beside a training step's memory, yet nearly all
# matrices are one piece, and no operand is converted twice.
PIECE_BYTES = 16 << 20

# A layer's weights read once (csrc/linear/skinny.cpp). Beside the library's product with 768 x 3072 weights, on two
# cores of a Cascade Lake Xeon, ours takes 0.45 of the time for 1 to 4 rows in float32 and 0.75 for 16; in bfloat16 0.6,
# 0.3 and 0.4.
SKINNY_ROWS = 16

# A layer's weights multiplied where they lie (csrc/linear/narrow.cpp): up to so many rows, with weights that are not in
# the cache, 1.1 to 1.6 times as fast as the library in float32 on the same cores, 1.3 to 2.8 times in bfloat16. From
# 400 rows on the library is as fast (python -m benchmarks.few_rows).
NARROW_ROWS = 256

# The library is as fast in float32 where the weights have fewer elements.
_NARROW_WEIGHTS = 1 << 19

# Products of so many multiply-adds, and no side of the result shorter than that, are our own where the library lags
# (csrc/linear/packed.cpp; python -m benchmarks.large_products). Two cores of a Zen 4 EPYC make 176 to 210 GFLOP/s in
# float32, 155 to 194 by MKL; smaller float32 products lie in the caches, and MKL is as fast. In bfloat16 oneDNN is as
# fast where products are large, and takes longer where they are small, or added up in float32: those are ours of any
# size.
PACKED_WORK = 16 << 20
_PACKED_SIDE = 16

# With less depth than this the time is that of writing the result, unless it is so small that it lies in a cache.
_PACKED_DEPTH = 64
_SMALL_RESULT = 1 << 16  # elements

# With a side shorter than this, converting the other matrices takes longer than the library's product.
_SHORTEST_SIDE = 8


def mm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    accumulate: bool = False,
    piece_bytes: int | None = None,
) -> None:
    """out = a @ b + bias, or out += a @ b, on the CPU. Autocast must be off.

    Args:
        a: (M, K) and b: (K, N), each contiguous or the transpose of a contiguous matrix (other strides work, slowly),
            of one dtype, or one in half precision and the other in float32.
        out: (M, N), in the operands' dtype or float32.
        bias: (N), the operands' dtype, or None.
        accumulate: add to `out`, which must be float32; without a bias.
        piece_bytes: so much of an operand is converted at a time; default: PIECE_BYTES.
    """
    if len(a) <= NARROW_ROWS and not accumulate and _few_rows(a, b, out, bias):
        return
    if library_lags() and _large(a, b, out, bias):
        packed(a, b, out, bias, accumulate)
    elif a.dtype != b.dtype or (widens(a.dtype) and min(*a.shape, b.shape[1]) >= _SHORTEST_SIDE):
        _widened(a, b, out, bias, accumulate, piece_bytes or PIECE_BYTES)
    elif out.dtype != a.dtype:
        product = a @ b if bias is None else torch.addmm(bias, a, b)
        out.add_(product) if accumulate else out.copy_(product)
    elif accumulate:
        out.addmm_(a, b)
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """x @ weight.T + bias, x (M, K), weight (N, K), in x's dtype, or `dtype`: float32. Autocast must be off."""
    out = memory.empty((x.shape[0], weight.shape[0]), dtype or x.dtype)
    mm(x, weight.t(), out, bias)
    return out


@functools.cache
def widens(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are made in float32 here: an x86-64 processor without instructions for it, or one
    that FASTLM_CPU_ISA makes such."""
    if dtype not in (torch.bfloat16, torch.float16) or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if native.cpu_unavailable() is not None:
        return False
    isa = native.C.cpu_isa()
    if dtype == torch.bfloat16:
        return isa != "avx512_bf16"
    return not isa.startswith("avx512") or "avx512_fp16" not in native.C.cpu_features()


@functools.cache
def library_lags() -> bool:
    """Whether csrc/linear/packed.cpp is at least as fast as the library: beside torch with MKL on AMD's processors with
    AVX2 or more. Elsewhere it was not measured, or is not faster."""
    return _has_wide_registers() and torch.backends.mkl.is_available() and mkl.processor() == "AuthenticAMD"


def slow_library(dtype: torch.dtype, work: int) -> bool:
    """Whether products of this dtype, of `work` multiply-adds, are better left to `mm` than to PyTorch."""
    ours = dtype in (torch.float32, torch.bfloat16) and work >= _least_work(dtype)
    return widens(dtype) or (ours and library_lags())


def _least_work(dtype: torch.dtype) -> int:
    """Of a product of this dtype, made of floats or of pairs of bfloat16, for csrc/linear/packed.cpp."""
    return 0 if dtype == torch.bfloat16 and not widens(dtype) else PACKED_WORK


def _large(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None) -> bool:
    """Whether out = a @ b + bias is for csrc/linear/packed.cpp."""
    (rows, cols), depth = out.shape, a.shape[1]
    least = _least_work(a.dtype) if a.dtype == b.dtype else PACKED_WORK
    if rows * cols * depth < least or min(rows, cols, depth) < _PACKED_SIDE:
        return False
    if depth < _PACKED_DEPTH and rows * cols > _SMALL_RESULT:
        return False
    if out.stride(1) != 1 or any(1 not in t.stride() for t in (a, b)):
        return False
    if bias is not None and (bias.dtype != b.dtype or bias.stride(0) != 1):
        return False
    return torch.float16 not in (a.dtype, b.dtype) or widens(torch.float16)


def _few_rows(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None) -> bool:
    """out = a @ b + bias by csrc/linear, b being a layer's weight transposed; False where that is not for these."""
    (rows, depth), cols = a.shape, b.shape[1]
    if a.stride(1) != 1 or b.stride(0) != 1 or out.stride(1) != 1 or not rows or not depth or not cols:
        return False
    if bias is not None and (bias.dtype != b.dtype or bias.stride(0) != 1):
        return False
    if rows <= SKINNY_ROWS and a.dtype == b.dtype == out.dtype and out.is_contiguous():
        skinny(a, b.t(), bias, out, rows)
        return True
    if not _has_wide_registers() or any(t.dtype != torch.float32 and not widens(t.dtype) for t in (a, b, out)):
        return False
    if a.dtype == b.dtype == torch.float32 and b.numel() < _NARROW_WEIGHTS:
        return False
    narrow(a, b.t(), bias, out)
    return True


def skinny(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, count: int) -> None:
    """y = x @ weight.T + bias for at most SKINNY_ROWS rows on the CPU; y is contiguous, weight's rows are."""
    x, x_stride = native.rows(x)
    bias = None if bias is None else bias.contiguous()
    native.C.skinny_linear(
        x.data_ptr(),
        weight.data_ptr(),
        native.pointer(bias),
        y.data_ptr(),
        count,
        weight.shape[0],
        weight.shape[1],
        x_stride,
        weight.stride(0),
        native.DTYPE_CODE[x.dtype],
    )


def narrow(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y = x @ weight.T + bias for any number of rows, made for up to NARROW_ROWS, on the CPU.

    Args:
        x: (M, K), weight: (N, K), y: (M, N): contiguous rows, each float32, bfloat16 or float16. Sums are float32.
        bias: (N), contiguous, weight's dtype, or None.
    """
    workspace = memory.empty((native.C.narrow_linear_workspace(*x.shape),), torch.float32)
    native.C.narrow_linear(
        x.data_ptr(),
        weight.data_ptr(),
        native.pointer(bias),
        y.data_ptr(),
        workspace.data_ptr(),
        *y.shape,
        x.shape[1],
        x.stride(0),
        weight.stride(0),
        y.stride(0),
        native.DTYPE_CODE[x.dtype],
        native.DTYPE_CODE[weight.dtype],
        native.DTYPE_CODE[y.dtype],
    )


def packed(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, accumulate: bool = False) -> None:
    """mm's contract by csrc/linear/packed.cpp, for any sizes; a, b and out each float32, bfloat16 or float16."""
    (a_stride, a_transposed), (b_stride, b_transposed) = _layout(a), _layout(b)
    native.C.packed_product(
        a.data_ptr(),
        a_stride,
        a_transposed,
        native.DTYPE_CODE[a.dtype],
        b.data_ptr(),
        b_stride,
        b_transposed,
        native.DTYPE_CODE[b.dtype],
        native.pointer(bias),
        out.data_ptr(),
        *out.shape,
        a.shape[1],
        out.stride(0),
        native.DTYPE_CODE[out.dtype],
        accumulate,
    )


def _layout(t: Tensor) -> tuple[int, bool]:
    """How far apart the rows of t are, or those of its transpose, and whether it is the transpose."""
    return (t.stride(0), False) if t.stride(1) == 1 else (t.stride(1), True)


@functools.cache
def _has_wide_registers() -> bool:
    """Whether the kernels use AVX2 or more: without it, and on arm64, they were not measured beside the library."""
    return native.cpu_unavailable() is None and native.C.cpu_isa() != "baseline"


def _widened(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, accumulate: bool, piece_bytes: int) -> None:
    (m, k), n = a.shape, b.shape[1]
    exact = out.dtype == torch.float32
    a_by_rows, b_by_rows = not _transposed(a), not _transposed(b)
    a_half, b_half = a.dtype != torch.float32, b.dtype != torch.float32

    # Pieces are cut where a matrix is contiguous: across its rows, or across the columns of a transposed one.
    limit = piece_bytes // 4
    rows = _pieces(m, limit, [k] * (a_half and a_by_rows) + [n] * (not exact))
    height = rows[0].stop if rows else 0
    columns = _pieces(n, limit, [k] * (b_half and not b_by_rows))
    depths = _pieces(k, limit, [height] * (a_half and not a_by_rows) + [n] * (b_half and b_by_rows))

    scratch = None if exact else memory.empty((height, n), torch.float32)
    wide_bias = None if bias is None else bias.float()
    for i in rows:
        total = _cut(out, i, _ALL) if scratch is None else _cut(scratch, slice(0, i.stop - i.start), _ALL)
        a_part = _wide(_cut(a, i, _ALL)) if a_by_rows else _cut(a, i, _ALL)
        for j in columns:
            into = _cut(total, _ALL, j)
            for d in depths:
                left, right = _wide(_cut(a_part, _ALL, d)), _wide(_cut(b, d, j))
                if accumulate or d.start > 0:
                    into.addmm_(left, right)
                elif wide_bias is None:
                    torch.mm(left, right, out=into)
                else:
                    torch.addmm(wide_bias[j], left, right, out=into)
            if not depths and not accumulate:
                into.zero_() if wide_bias is None else into.copy_(wide_bias[j].expand_as(into))
        if not exact:
            _cut(out, i, _ALL).copy_(total)


_ALL = slice(None)


def _cut(t: Tensor, rows: slice, columns: slice) -> Tensor:
    """t[rows, columns], and mostly all of it: a view costs as much as a small product."""
    if rows is not _ALL and rows.stop - rows.start < t.shape[0]:
        t = t[rows]
    return t[:, columns] if columns is not _ALL and columns.stop - columns.start < t.shape[1] else t


def _pieces(length: int, limit: int, widths: list[int]) -> list[slice]:
    """Pieces of `length` that, times the widest of `widths`, have at most `limit` elements."""
    step = max(1, limit // max(widths) if any(widths) else length)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _transposed(t: Tensor) -> bool:
    return t.stride(0) == 1 and t.stride(1) != 1


def _wide(t: Tensor) -> Tensor:
    """t in float32, lying in memory as it did."""
    if t.dtype == torch.float32:
        return t
    if _transposed(t):
        return _wide(t.t()).t()
    wide = memory.empty(t.shape, torch.float32)
    return wide.copy_(t)
