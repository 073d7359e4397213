"""Rotary positions: queries and keys are turned by an angle that grows with their position.

Su et al.: RoFormer (arXiv:2104.09864).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastlm.ops import checks, library, registry
from fastlm.ops.rotary import native, reference, triton


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turn each pair (a, b) of a head's dimensions by its angle: a' = a cos - b sin, b' = b cos + a sin.

    With R/2 angles the first R dimensions of a head are turned, and the other D - R are left as they are.

    Args:
        q: (B, T, H, D), float32, bfloat16 or float16 (float64 on the reference backend). Any strides; views whose last
            dimension is contiguous, such as slices of one projection, are read without a copy.
        k: (B, T, H_kv, D) of q's dtype.
        cos, sin: the cosines and sines of the angles, float32 (float64 beside float64), without gradients: (T, R/2), or
            (B, T, R/2) where rows differ. With `positions`: tables (P, R/2).
        positions: (T) or (B, T), int64 or int32: which row of the tables each token takes. On the CPU a position
            outside of them is an error; on CUDA looking at the positions would wait for the device, and the token
            becomes NaN.
        interleaved: the pairs are the dimensions (2i, 2i + 1), as in RoFormer and GPT-J; else (i, i + R/2), as in
            GPT-NeoX and transformers' Llama.
        inplace: write the result into q and k, which are then returned. Only where no gradient is asked for.

    Returns:
        q and k, turned, in their dtype; contiguous unless in place. Computed in float32. Autocast changes nothing here.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit together; on the CPU: a position is out of range.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    call = _prepare(q, k, cos, sin, positions=positions, interleaved=interleaved, inplace=inplace)
    cos, sin = call[2:4]
    backend = registry.choose("rotary", q.device.type, call)
    if inplace:
        _inplace(q, k, cos, sin, positions, interleaved, backend)
        if not library.watched():  # the dispatcher counts by itself
            increment_version((q, k))
        return q, k
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _apply(q, k, cos, sin, positions, interleaved, backend)
    return _forward(q, k, cos, sin, positions, interleaved, backend)


def _prepare(q, k, cos, sin, *, positions=None, interleaved=False, inplace=False) -> tuple:
    """Check the contract; the arguments of a backend's `forward`."""
    op = "rotary"
    if q.dim() != 4 or k.dim() != 4:
        name, t = ("q", q) if q.dim() != 4 else ("k", k)
        raise ValueError(f"{op}: {name} must have 4 dimensions (batch, length, heads, dim), got {tuple(t.shape)}")
    batch, length, _, width = q.shape
    if q.dtype not in checks.FLOATS or k.dtype != q.dtype:
        checks.floating(op, q=q, k=k)
        checks.same_dtype(op, "q", q, k=k)
    if k.device != q.device or cos.device != q.device or sin.device != q.device or positions is not None:
        checks.same_device(op, "q", q, k=k, cos=cos, sin=sin, positions=positions)
    if k.shape[:2] != q.shape[:2] or k.shape[3] != width:
        raise ValueError(
            f"{op}: k must have shape (B, T, H_kv, D) = ({batch}, {length}, H_kv, {width}) to go with q"
            f" {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    wide = checks.statistics_dtype(q)
    if cos.dtype != wide or sin.dtype != wide:
        raise ValueError(f"{op}: cos and sin must be {wide} beside {q.dtype} q, got {cos.dtype} and {sin.dtype}")
    if positions is not None:
        if positions.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{op}: positions must be int64 or int32, got {positions.dtype}")
        if positions.shape != (length,) and positions.shape != (batch, length):
            raise ValueError(
                f"{op}: positions must have shape (T) = ({length},) or (B, T) = ({batch}, {length}),"
                f" got {tuple(positions.shape)}"
            )
        if cos.dim() != 2:
            raise ValueError(f"{op}: with positions cos must be a table (P, R/2), got shape {tuple(cos.shape)}")
    elif cos.dim() not in (2, 3) or cos.shape[:-1] not in ((length,), (batch, length)):
        raise ValueError(
            f"{op}: cos must have shape (T, R/2) or (B, T, R/2) with B = {batch}, T = {length}, got {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape:
        checks.shape(op, "sin", sin, cos.shape, "of cos")
    if 2 * cos.shape[-1] > width:
        raise ValueError(
            f"{op}: cos has {cos.shape[-1]} angles a token, for more than the {width} dimensions of a head"
        )
    checks.refuse_tangents(op, cos, sin)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError(
            f"{op}: cos and sin get no gradient, but one of them requires it; pass cos.detach(), sin.detach()"
        )
    if inplace:
        _check_inplace(op, q, k)
    return q, k, cos.detach(), sin.detach(), positions, bool(interleaved), bool(inplace)


def _check_inplace(op: str, q: Tensor, k: Tensor) -> None:
    for name, t in (("q", q), ("k", k)):
        if torch.is_grad_enabled() and t.requires_grad:
            raise ValueError(f"{op}: inplace is for calls without gradients, but {name} requires one")
        if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
            raise ValueError(f"{op}: inplace cannot write to {name}, whose elements share memory: strides {t.stride()}")


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, interleaved, backend):  # type: ignore[override]
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved, ctx.backend = interleaved, backend
        ctx.set_materialize_grads(False)
        return _forward(q, k, cos, sin, positions, interleaved, backend)

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dq, dk):  # type: ignore[override]
        gradients: list[Any] = [None, None]
        if dq is not None or dk is not None:
            gradients = list(_backward(dq, dk, *ctx.saved_tensors, ctx.interleaved, ctx.backend))
        dq, dk = (None if d is None else g for d, g in zip((dq, dk), gradients, strict=True))
        return dq, dk, None, None, None, None, None


_apply = library.apply_of(_Rotary)


def _forward_impl(q, k, cos, sin, positions, interleaved, backend):
    return registry.implementation("rotary", backend).forward(q, k, cos, sin, positions, interleaved, False)


def _inplace_impl(q, k, cos, sin, positions, interleaved, backend):
    registry.implementation("rotary", backend).forward(q, k, cos, sin, positions, interleaved, True)


def _backward_impl(dq, dk, cos, sin, positions, interleaved, backend):
    return registry.implementation("rotary", backend).backward(dq, dk, cos, sin, positions, interleaved)


def _fake(q, k, cos, sin, positions, interleaved, backend):
    return tuple(cos.new_empty(0) if t is None else t.new_empty(t.shape) for t in (q, k))


_ARGUMENTS = "Tensor cos, Tensor sin, Tensor? positions, bool interleaved, str backend"
_forward = library.define(f"rotary_forward(Tensor q, Tensor k, {_ARGUMENTS}) -> (Tensor, Tensor)", _forward_impl, _fake)
_inplace = library.define(
    f"rotary_inplace(Tensor(a!) q, Tensor(b!) k, {_ARGUMENTS}) -> ()", _inplace_impl, lambda *arguments: None
)
# dq, dk: each empty where the gradient of its output is not given
_backward = library.define(
    f"rotary_backward(Tensor? dq, Tensor? dk, {_ARGUMENTS}) -> (Tensor, Tensor)", _backward_impl, _fake
)

registry.register("rotary", _prepare, reference=reference, cpu=native, cuda=native, triton=triton)
