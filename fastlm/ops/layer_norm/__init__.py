"""Layer norm and RMS norm, with the residual addition in front of them.

Ba, Kiros, Hinton: Layer Normalization (arXiv:1607.06450).
Zhang, Sennrich: Root Mean Square Layer Normalization (arXiv:1910.07467).
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from fastlm.ops import checks, library, registry
from fastlm.ops import native as compiled
from fastlm.ops.layer_norm import native, reference, triton


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, eps: float = ..., residual: None = ...
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, eps: float = ..., residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation over the last dimension, of `x` or of `x + residual`.

    Args:
        x: (..., C), float32, bfloat16 or float16 (float64 on the reference backend); any strides.
        weight: (C), any of these dtypes.
        bias: (C), weight's dtype, or None.
        eps: added to the variance.
        residual: x's shape; its dtype may be wider than x's (a float32 residual stream beside bfloat16 branches).

    Returns:
        y (..., C) in x's dtype; with a residual (y, h), h = x + residual in residual's dtype. The statistics are
        those of the rounded h, in float32. Autocast changes nothing here.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    return _run("layer_norm", x, weight, bias, eps, residual, False)


@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = ..., residual: None = ...) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = ..., residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS normalisation over the last dimension, of `x` or of `x + residual`: h * rsqrt(mean(h²) + eps) * weight.

    Shapes, dtypes, result and errors as for `layer_norm`.
    """
    return _run("rms_norm", x, weight, None, eps, residual, True)


def _prepare(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, rms: bool
) -> tuple:
    """Check the contract; the arguments of the raw op.

    The conditions stand in front of the checks that word the errors, because a call of a check costs as much as a
    small kernel.
    """
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    shape, device = x.shape, x.device
    width = shape[-1]
    if width == 0:
        raise ValueError(f"{op}: the last dimension of x must not be empty, got shape {tuple(shape)}")
    if weight.shape != (width,):
        checks.shape(op, "weight", weight, (width,), "(C)")
    if x.dtype not in checks.FLOATS or weight.dtype not in checks.FLOATS:
        checks.floating(op, x=x, weight=weight)
    if weight.device != device:
        checks.same_device(op, "x", x, weight=weight)
    if bias is not None and (bias.shape != (width,) or bias.dtype != weight.dtype or bias.device != device):
        checks.same_device(op, "x", x, bias=bias)
        checks.shape(op, "bias", bias, (width,), "(C)")
        checks.same_dtype(op, "weight", weight, bias=bias)
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype or residual.device != device):
        checks.floating(op, residual=residual)
        checks.same_device(op, "x", x, residual=residual)
        checks.shape(op, "residual", residual, shape, "of x")
        if torch.promote_types(x.dtype, residual.dtype) != residual.dtype:
            raise ValueError(f"{op}: residual is {residual.dtype}, which cannot hold x's {x.dtype}")
    if eps < 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")
    return x, weight, bias, residual, float(eps), rms


def _run(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, rms: bool
) -> Any:
    recorded = torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    if compiled.takes_tensors():
        results = compiled.C.layer_norm_forward_torch(x, weight, bias, residual, eps, rms, recorded)
        if results is not None:
            return _record(x, weight, bias, residual, (eps, rms, "cpu", results)) if recorded else results
    call = _prepare(op, x, weight, bias, eps, residual, rms)
    backend = registry.choose(op, x.device.type, call)
    if recorded:
        return _apply(x, weight, bias, residual, (eps, rms, backend, None))
    y, h, _ = _forward(*call, backend)
    return y if residual is None else (y, h)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, call):  # type: ignore[override]
        # The rest is one argument and one attribute: beside a large kernel, whose data has filled the caches, each
        # object that is touched costs a microsecond.
        eps, rms, backend, results = call
        y, h, statistics = results or _forward(x, weight, bias, residual, eps, rms, backend)
        has_residual = residual is not None
        ctx.call = has_residual, bias is not None, rms, backend
        ctx.save_for_backward(h if has_residual else x, weight, statistics)
        ctx.set_materialize_grads(False)
        return (y, h) if has_residual else y

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dy, dh=None):  # type: ignore[override]
        has_residual, has_bias, rms, backend = ctx.call
        h, weight, statistics = ctx.saved_tensors
        if dy is None:  # only h was used
            return dh, None, None, dh, None
        if backend == "cpu" and not library.watched() and compiled.reads_tensors():
            gradients = compiled.C.layer_norm_backward_torch(dy, dh, h, weight, statistics, has_bias, has_residual)
            if gradients is not None:
                return *gradients, None
        dx, dresidual, dweight, dbias = _backward(dy, dh, h, weight, statistics, has_bias, rms, backend)
        if has_residual:
            dresidual = dx if h.dtype == dy.dtype else dresidual
        else:
            dresidual = None
        return dx, dweight, dbias if has_bias else None, dresidual, None


_apply, _record = library.apply_of(_LayerNorm), library.plain_apply_of(_LayerNorm)


def _forward_impl(x, weight, bias, residual, eps, rms, backend):
    return registry.implementation("layer_norm", backend).forward(x, weight, bias, residual, eps, rms)


def _forward_fake(x, weight, bias, residual, eps, rms, backend):
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else residual.new_empty(x.shape),
        x.new_empty((1 if rms else 2, *x.shape[:-1]), dtype=checks.statistics_dtype(x)),
    )


def _backward_impl(dy, dh, h, weight, statistics, has_bias, rms, backend):
    return registry.implementation("layer_norm", backend).backward(dy, dh, h, weight, statistics, has_bias, rms)


def _backward_fake(dy, dh, h, weight, statistics, has_bias, rms, backend):
    return (
        dy.new_empty(dy.shape),
        h.new_empty(h.shape if h.dtype != dy.dtype else 0),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape if has_bias else 0),
    )


# y, h (empty without a residual), statistics (2, ...): mean and rstd; for RMS norm (1, ...): rstd
_forward = library.define(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, bool rms, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
# dx, dresidual (empty where h has x's dtype: it is dx then), dweight, dbias (empty without a bias)
_backward = library.define(
    "layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor statistics, bool has_bias,"
    " bool rms, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _prepare_layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None):
    return _prepare("layer_norm", x, weight, bias, eps, residual, False)


def _prepare_rms_norm(x, weight, *, eps=1e-6, residual=None):
    return _prepare("rms_norm", x, weight, None, eps, residual, True)


registry.register("layer_norm", _prepare_layer_norm, reference=reference, cpu=native, cuda=native, triton=triton)
registry.register("rms_norm", _prepare_rms_norm, reference=reference, cpu=native, cuda=native, triton=triton)
