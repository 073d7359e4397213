"""In which dtype an op's backward pass gives its gradients.

Under autocast an op computes in another dtype than its weights have. Their gradients are made in float32 then, in which
the products add up anyway: so they reach float32 parameters unrounded, without a pass of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import native
from fastlm.ops.native import DTYPE_CODE

_SMALL = 1 << 15  # elements up to which torch sums on one thread, and sooner than a call of the kernel begins
_MM_HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()  # from torch 2.8


def others(originals: Sequence[Tensor | None], taken: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What autocast took instead of the originals; None for the originals themselves, because torch.compile does not
    let an autograd.Function have a tensor twice."""
    return [None if t is original else t for original, t in zip(originals, taken, strict=True)]


def taken_of(originals: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> list[Any]:
    """The inverse of `others`."""
    return [original if t is None else t for original, t in zip(originals, others, strict=True)]


def dtype_of(original: Tensor, taken: Tensor) -> torch.dtype:
    """The dtype of the gradient of what autocast took in another dtype: float32, so that nothing is rounded on its way
    to a float32 parameter."""
    return taken.dtype if taken.dtype == original.dtype else torch.float32


def dtypes_of(*tensors: Tensor | None) -> list[torch.dtype | None]:
    """Those of an op's inputs, which may be absent."""
    return [None if t is None else t.dtype for t in tensors]


def given_back(
    dtypes: Sequence[torch.dtype | None], gradients: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """What a backward pass returns: each gradient in the dtype of its input, None where nobody asked."""
    given = zip(dtypes, gradients, needs, strict=True)
    return [(g if g.dtype == dtype else g.to(dtype)) if need else None for dtype, g, need in given]


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy.T @ x in `dtype`, dy (N, F) and x (N, C): into float32 not rounded before, where torch can do that."""
    if dtype != dy.dtype and writes_float32(dy):
        return torch.mm(dy.T, x, out_dtype=dtype)
    return (dy.T @ x).to(dtype)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dy (N, F) summed over its rows, in float32 in an order that depends on the sizes alone: (F), in `dtype`."""
    rows, cols = dy.shape
    on_cuda = native.on_cuda(dy)
    if not on_cuda and dy.numel() <= _SMALL:
        return dy.sum(0, dtype=dtype)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    sums = dy.new_empty(cols, dtype=dtype)
    workspace = dy.new_empty(native.C.column_sums_workspace(on_cuda, rows, cols), dtype=torch.float32)
    pointers = dy.data_ptr(), sums.data_ptr(), workspace.data_ptr()
    types = DTYPE_CODE[dy.dtype], DTYPE_CODE[dtype]
    native.C.column_sums(on_cuda, *pointers, rows, cols, dy.stride(0), *types, native.stream(dy))
    return sums


def writes_float32(operand: Tensor) -> bool:
    """Whether torch.mm writes its product in half precision as float32, as it does on a GPU."""
    return _MM_HAS_OUT_DTYPE and operand.is_cuda and operand.numel() > 0
