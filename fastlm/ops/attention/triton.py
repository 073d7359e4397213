"""Attention in Triton: what the registry calls, the launches, and the tables of block sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.ops import philox
from fastlm.ops.attention import triton_tiles
from fastlm.ops.triton_support import (
    Example,
    Kernel,
    architecture,
    availability,
    cdiv,
    dtype_name,
    next_power_of_2,
)

WIDEST, WIDEST_FLOAT32 = 256, 128  # head dim
LONGEST = 2**30  # rows or columns: sums of two positions stay in 32 bits
WIDEST_ROW = 2**31 // 512  # of a stride between rows: a block's own offsets stay in 32 bits

_WITH_TMA = ("sm_90", "sm_100")
_LOG2_E = math.log2(math.e)


def unsupported(q: Tensor, k: Tensor, *rest: object) -> str | None:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels are for float32, bfloat16 and float16, got {q.dtype}"
    if q.shape[3] > WIDEST:
        return f"its kernels are for head dims up to {WIDEST}, got {q.shape[3]}"
    if q.dtype == torch.float32 and q.shape[3] > WIDEST_FLOAT32:
        return f"its float32 kernels are for head dims up to {WIDEST_FLOAT32}, got {q.shape[3]}: wider ones would spill"
    if max(q.shape[1], k.shape[1]) > LONGEST:
        return f"its kernels are for lengths up to {LONGEST}, got {q.shape[1]} queries and {k.shape[1]} keys"
    return None


_MODULE = "fastlm.ops.attention"
FORWARD = Kernel(f"{_MODULE}.triton_forward:forward", triton_tiles.forward)
TERMS = Kernel(f"{_MODULE}.triton_backward:row_terms", triton_tiles.terms)
COLUMNS = Kernel(f"{_MODULE}.triton_backward:columns_backward", triton_tiles.columns)
ROWS = Kernel(f"{_MODULE}.triton_backward:rows_backward", triton_tiles.rows)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    rng_state: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    q, k, v = _rows(q), _rows(k), _rows(v)
    heavy = _heavy(alibi_slopes, softcap, dropout_p)
    described = not heavy and cu_seqlens is None and _describable(q, k, v)
    unit = _unit(q, k, v)
    config = FORWARD.config(q.device, _problem(q, heavy, described, unit))
    sequences, longest, _ = _extent(q, k, cu_seqlens, max_seqlen)
    blocks = cdiv(longest, config["BLOCK_M"])
    options = _options(window_left, window_right, softcap)
    FORWARD(
        config,
        (blocks * heads * sequences, 1, 1),
        *(q, *(_descriptors(config["BLOCK_N"], k, v) if described else (k, v))),
        *(out, lse, _base2(alibi_slopes), cu_seqlens, rng_state),
        *_strides(unit, q, k, v),
        heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        blocks,
        *_numbers(q, k, scale, window_left, window_right, softcap),
        *_dropout(dropout_p),
        *_shape(q, k, unit),
        *options,
        scale > 0 and softcap == 0 and alibi_slopes is None,
        cu_seqlens is None,
        not heavy,
        _precision(q),
        described,
    )
    return out, lse


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    rng_state: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    if dout is None:  # only lse was used, which does not look at v
        dout, v = torch.zeros_like(out), torch.zeros_like(v)
    q, k, v, dout = _rows(q), _rows(k), _rows(v), _rows(dout)
    dlse = None if dlse is None else dlse.contiguous()
    heavy = _heavy(alibi_slopes, softcap, dropout_p)
    described = not heavy and cu_seqlens is None and _describable(q, k, v, dout)
    unit = _unit(q, k, v, dout)
    problem = _problem(q, heavy, described, unit)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)

    config = TERMS.config(q.device, problem)
    blocks = cdiv(length, config["BLOCK_M"])
    TERMS(
        config,
        (blocks * heads * batch, 1, 1),
        *(out, dout, lse, dlse, lse2, delta),
        *_strides(_unit(dout), dout),
        length,
        blocks,
        *(heads, width, _padded(width), _unit(dout)),
    )
    sequences, rows, columns = _extent(q, k, cu_seqlens, max_seqlen)
    numbers = _numbers(q, k, scale, window_left, window_right, softcap)
    options = _options(window_left, window_right, softcap)
    constants = (*_shape(q, k, unit), *options, cu_seqlens is None, not heavy, _precision(q))
    slopes = _base2(alibi_slopes)
    slopes_stride = heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0

    narrow = described and width <= 128  # wider: the blocks that fit are too small for Hopper's warp groups
    config = COLUMNS.config(q.device, _problem(q, heavy, narrow, unit))
    blocks = cdiv(columns, config["BLOCK_N"])
    q_read, dout_read = _descriptors(config["BLOCK_M"], q, dout) if narrow else (q, dout)
    COLUMNS(
        config,
        (blocks * kv_heads * sequences, 1, 1),
        *(q_read, k, v, dout_read, lse2, delta, dk, dv, slopes, cu_seqlens, rng_state),
        *_strides(unit, q, k, v, dout),
        *(slopes_stride, blocks, *numbers, scale, *_dropout(dropout_p)),
        *constants,
        narrow,
        dk.stride(1),
    )
    config = ROWS.config(q.device, problem)
    blocks = cdiv(rows, config["BLOCK_M"])
    k_read, v_read = _descriptors(config["BLOCK_N"], k, v) if described else (k, v)
    ROWS(
        config,
        (blocks * heads * sequences, 1, 1),
        *(q, k_read, v_read, dout, lse2, delta, dq, slopes, cu_seqlens, rng_state),
        *_strides(unit, q, k, v, dout),
        *(slopes_stride, blocks, *numbers, scale, *_dropout(dropout_p)),
        *constants,
        described,
        dq.stride(1),
    )


def _rows(t: Tensor) -> Tensor:
    """With a contiguous last dimension and rows close enough together: what the kernels ask of strides."""
    return t if t.stride(3) == 1 and t.stride(1) < WIDEST_ROW else t.contiguous()


def _unit(*tensors: Tensor) -> int:
    """What the kernels may take to divide every stride: with 8, they load 16 bytes at a time."""
    return 8 if all(s % 8 == 0 for t in tensors for s in t.stride()[:3]) else 1


def _strides(unit: int, *tensors: Tensor) -> tuple[int, ...]:
    return tuple(s // unit for t in tensors for s in t.stride()[:3])


def _heavy(slopes: Tensor | None, softcap: float, dropout_p: float) -> bool:
    """Whether a score costs much more than two products of matrices. Then the kernels have smaller tiles and one loop,
    with masks, in place of three: masks are a small part of it."""
    return softcap > 0 or slopes is not None or dropout_p > 0


def _problem(q: Tensor, heavy: bool, described: bool, unit: int) -> tuple[str, int, str]:
    """Odd strides count as heavy: each address takes registers."""
    heavy = heavy or unit == 1
    return dtype_name(q), _padded(q.shape[3]), "heavy" if heavy else "descriptors" if described else "pointers"


def _describable(*tensors: Tensor) -> bool:
    """Whether the GPU has a TMA, and it can read these: bases and strides of 16 bytes, nothing empty."""
    return (
        tensors[0].dtype != torch.float32  # whose products are not those of Hopper's warp groups
        and architecture(tensors[0].device) in _WITH_TMA
        and availability.version() >= (3, 4)
        and all(
            t.numel() > 0 and t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:3])
            for t in tensors
        )
    )


def _descriptors(block: int, *tensors: Tensor) -> tuple:
    """For the TMA, which puts zeros beyond the last row and beyond the head dim.

    Only what a kernel's loop reads: what stays, the compiler would keep in registers if the TMA had brought it.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return tuple(
        TensorDescriptor(t, list(t.shape), [*t.stride()[:3], 1], [1, block, 1, _padded(t.shape[3])]) for t in tensors
    )


def _padded(width: int) -> int:
    """The head dim inside the kernels: tensor cores take 16 at a time, blocks are powers of two."""
    return next_power_of_2(max(width, 16))


def _extent(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[int, int, int]:
    """(sequences, rows of the longest, columns of the longest): the grids, without a look at cu_seqlens."""
    if cu_seqlens is None:
        return q.shape[0], q.shape[1], k.shape[1]
    longest = min(max_seqlen, q.shape[1])
    return cu_seqlens.shape[0] - 1, longest, longest


def _base2(slopes: Tensor | None) -> Tensor | None:
    return None if slopes is None else slopes * _LOG2_E


def _numbers(q: Tensor, k: Tensor, scale: float, left: int, right: int, softcap: float) -> tuple[int | float, ...]:
    """rows, columns, left, right, scale, cap of the kernels."""
    rows, columns = q.shape[1], k.shape[1]
    farthest = rows + columns  # further than any position: keeps sums in 32 bits
    factor, cap = (scale / softcap, softcap * _LOG2_E) if softcap > 0 else (scale * _LOG2_E, 0.0)
    return rows, columns, min(left, farthest), min(right, farthest), factor, cap


def _dropout(p: float) -> tuple[int, float]:
    return philox.threshold(p), 1 / (1 - p)


def _shape(q: Tensor, k: Tensor, unit: int) -> tuple[int, ...]:
    heads, width = q.shape[2:]
    return heads, heads // k.shape[2], width, _padded(width), unit


def _options(left: int, right: int, softcap: float) -> tuple[bool, ...]:
    return left >= 0, right >= 0, softcap > 0


def _precision(q: Tensor) -> str:
    """Of products of float32: three passes of TF32 keep its precision on NVIDIA's tensor cores; AMD's have float32."""
    return "ieee" if architecture(q.device).startswith("gfx") else "tf32x3"


def examples(device: torch.device) -> Iterator[Example]:
    """Head dims of common models, some padded; what makes other code: dtypes, causal or not, every option at once."""
    for width in (64, 128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            if dtype == torch.float32 and width > WIDEST_FLOAT32:
                continue
            yield _example(device, width, dtype, causal=True)
            if dtype != torch.float32:  # whose tiles are the same with and without descriptors
                yield _example(device, width, dtype, causal=True, packed=True)
            yield _example(device, width, dtype, causal=True, packed=True, every_option=True)
    for width, dtype in ((80, torch.bfloat16), (77, torch.float16)):
        yield _example(device, width, dtype, causal=True)
    yield _example(device, 128, torch.bfloat16)


def _example(device: torch.device, width: int, dtype: torch.dtype, **traits: bool) -> Example:
    """`every_option`: a window, softcap, ALiBi and dropout."""
    every = "every_option" in traits

    def call() -> None:
        q = torch.ones(1, 4096, 8, width, dtype=dtype, device=device)
        k, v = (torch.ones(1, 4096, 4, width, dtype=dtype, device=device) for _ in range(2))
        ends = torch.tensor([0, 4096], dtype=torch.int32, device=device) if "packed" in traits else None
        slopes = torch.ones(8, device=device) if every else None
        state = torch.ones(2, dtype=torch.int64, device=device) if every else None
        causal = "causal" in traits
        softcap, dropout_p = (30.0, 0.1) if every else (0.0, 0.0)
        options = width**-0.5, 512 if every else -1, 0 if causal else -1, softcap, dropout_p, 4096
        out, lse = forward(q, k, v, slopes, ends, state, *options)
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        backward(out, lse if every else None, q, k, v, out, lse, slopes, ends, state, *options, *gradients)

    return Example(" ".join([str(width), str(dtype).removeprefix("torch."), *traits]), call)
