"""Matrix products on the GPU with what follows them fused in (csrc/gemm): what the ops' CUDA backends are made of.

Every product is a @ b.T, a (m, k) and b (n, k), as a linear layer has it. Either may be a transposed view.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops import native
from fastlm.ops.checks import autocast_off
from fastlm.ops.gradients import writes_float32
from fastlm.ops.native import DTYPE_CODE, pointer

_STORE, _ACTIVATE, _ACTIVATE_BACKWARD = 0, 1, 2  # EpilogueKind in csrc/gemm/gemm.h


class _Matrix(NamedTuple):
    """A matrix as the kernel takes it: rows (transposed: columns) are contiguous, `stride` elements apart."""

    tensor: Tensor
    stride: int
    transposed: bool


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """out = scale * (a @ b.T) + bias, or out += it.

    Args:
        a: (m, k), float32, bfloat16 or float16.
        b: (n, k), a's dtype.
        out: (m, n) with contiguous rows, a's dtype or float32; float32 where it is added to.
        bias: (n), a's dtype.
        scale: a float32 scalar on the device.
        accumulate: add to `out`.
    """
    if scale is None and library_is_faster(a):
        with autocast_off(a):
            if accumulate:
                if out.dtype == a.dtype == torch.float32 and bias is None:
                    return torch.addmm(out, a, b.T, out=out)
            elif out.dtype == a.dtype:
                return torch.mm(a, b.T, out=out) if bias is None else torch.addmm(bias, a, b.T, out=out)
            elif bias is None and writes_float32(a):
                return torch.mm(a, b.T, out_dtype=out.dtype, out=out)
    return _run(a, b, _STORE, 0, out, bias=bias, scale=scale, accumulate=accumulate)


def library_is_faster(a: Tensor) -> bool:
    """Whether the library makes a product with nothing to fuse.

    In half precision it takes less time than ours for most sizes: on an H200 0.8 to 0.98 of it, up to 1.15 of it for
    forward products of 768 columns. In float32 ours is three
    passes of TF32 by tensor cores, which take 1.2 times as long there as the library's float32. GPUs of compute
    capability 8.0 have little float32 beside their TF32 (an A100 19.5 TFLOP/s and 156; an H200 67 and 495): there ours
    it is, unless the user allows TF32, with which the library's is one pass.
    """
    if not a.is_cuda:
        return False
    return a.dtype != torch.float32 or not _is_sm80(a.device.index) or _allows_tf32()


def library_makes_float32(a: Tensor) -> bool:
    """Whether that holds for an operand in float32: what is fused into products of ours is a pass of its own then."""
    return a.dtype == torch.float32 and library_is_faster(a)


@functools.cache
def _is_sm80(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (8, 0)


def _allows_tf32() -> bool:
    """Whether the library may round float32 operands to TF32, as the user has set it."""
    settings = torch.backends.cuda.matmul
    precision = getattr(settings, "fp32_precision", None)  # from torch 2.9
    return settings.allow_tf32 if precision is None else precision == "tf32"


def activate(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: int, hidden: Tensor, pre: Tensor | None = None
) -> Tensor:
    """hidden = act(a @ b.T + bias), for a gated activation of twice its width; the pre-activation into `pre`."""
    return _run(a, b, _ACTIVATE, activation, hidden, bias=bias, pre=pre)


def activate_backward(
    a: Tensor, b: Tensor, pre: Tensor, activation: int, dpre: Tensor, hidden: Tensor | None, dbias: Tensor | None
) -> Tensor:
    """dpre from pre and the activation's gradient a @ b.T; into `hidden` the activation, into `dbias` dpre's sum."""
    return _run(a, b, _ACTIVATE_BACKWARD, activation, dpre, pre=pre, hidden=hidden, dbias=dbias)


def _run(
    a: Tensor,
    b: Tensor,
    kind: int,
    activation: int,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    accumulate: bool = False,
    pre: Tensor | None = None,
    hidden: Tensor | None = None,
    dbias: Tensor | None = None,
) -> Tensor:
    left, right = _matrix(a), _matrix(b)
    if left.transposed and (kind != _STORE or not right.transposed):
        left = _matrix(a.contiguous())
    bias = None if bias is None else bias.contiguous()
    tensors = left.tensor, right.tensor, bias, scale, out, pre, hidden, dbias
    dbias_type = DTYPE_CODE[(out if dbias is None else dbias).dtype]
    call = (
        [0 if t is None else t.data_ptr() for t in tensors],
        [*a.shape[:1], *b.shape, left.stride, right.stride, out.stride(0)],
        [left.transposed, right.transposed, accumulate],
        [kind, activation, DTYPE_CODE[a.dtype], DTYPE_CODE[out.dtype], dbias_type],
    )
    device = native.gemm_device(a)
    size = native.C.gemm_workspace(*call, *device)
    workspace = a.new_empty(size, dtype=torch.float32) if size else None
    native.C.gemm(*call, pointer(workspace), *device, native.stream(a))
    return out


def _matrix(t: Tensor) -> _Matrix:
    """As it lies in memory, where its rows or its columns are contiguous; else a copy."""
    if t.stride(1) == 1 or t.shape[1] <= 1:
        return _Matrix(t, t.stride(0), False)
    if t.stride(0) == 1:
        return _Matrix(t, t.stride(1), True)
    return _Matrix(t.contiguous(), t.shape[1], False)
