"""Rotary positions through fastlm._C: the C++ kernel on CPU tensors, the CUDA kernel on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import memory, native
from fastlm.ops.native import DTYPE_CODE, pointer


def unsupported(q: Tensor, *rest: object) -> str | None:
    if q.dtype not in DTYPE_CODE:
        return f"its kernels are for float32, bfloat16 and float16, got {q.dtype}"
    return None


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    if not inplace:
        return _turn(q, k, cos, sin, positions, interleaved, False)
    rows = [t if t.stride(3) == 1 else t.contiguous() for t in (q, k)]
    _run(rows, rows, cos, sin, positions, interleaved, False)
    for t, row in zip((q, k), rows, strict=True):
        if row is not t:
            t.copy_(row)
    return q, k


def backward(
    dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return _turn(dq, dk, cos, sin, positions, interleaved, True)


def _turn(
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    rows = [t if t is None or t.stride(3) == 1 else t.contiguous() for t in (q, k)]
    out = [None if t is None else memory.empty_like(t) for t in (q, k)]
    _run(rows, out, cos, sin, positions, interleaved, inverse)
    first, second = (cos.new_empty(0) if t is None else t for t in out)
    return first, second


def _run(
    inputs: list[Tensor | None] | list[Tensor],
    outputs: list[Tensor | None] | list[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    """The arguments in the order of csrc/bindings.cpp."""
    x = next(t for t in inputs if t is not None)
    batch, length, _, width = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    positions = None if positions is None else positions.contiguous()
    sizes: list[int] = []
    for t, y in zip(inputs, outputs, strict=True):
        sizes += (0,) * 7 if t is None or y is None else (*t.stride()[:3], *y.stride()[:3], t.shape[2])
    native.C.rotary(
        x.is_cuda,
        (*map(pointer, inputs), *map(pointer, outputs), cos.data_ptr(), sin.data_ptr(), pointer(positions)),
        (
            *sizes,
            cos.shape[0],
            length * cos.shape[-1] if cos.dim() == 3 else 0,
            length if positions is not None and positions.dim() == 2 else 0,
            batch,
            length,
            width,
            cos.shape[-1],
        ),
        positions is not None and positions.dtype == torch.int64,
        interleaved,
        inverse,
        DTYPE_CODE[x.dtype],
        native.stream(x),
    )
