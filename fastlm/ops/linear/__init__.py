"""A linear layer: x @ weight.T + bias.

Large products belong to the machine's library (cuBLAS, oneDNN, MKL), through torch. What is ours: on the CPU up to 256
rows, those of decoding and of a prompt, are multiplied by kernels that read the weights where they lie, large ones on
AMD's processors by one that is faster than the library there, and large results come from kept memory; on a GPU the
bias gradient is summed at the speed of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import checks, gradients, library, registry
from fastlm.ops.linear import cuda, native, reference, triton


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    Args:
        x: (..., C), float32, bfloat16 or float16 (float64 on the reference backend); any strides.
        weight: (F, C), x's dtype.
        bias: (F), x's dtype, or None.

    Returns:
        (..., F) in x's dtype. Under autocast all three are taken in its dtype, and the gradients of weight and bias
        reach float32 ones unrounded.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    call = _prepare(x, weight, bias)
    backend = registry.choose("linear", x.device.type, call)
    tensors = x, weight, bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _apply(*tensors, *gradients.others(tensors, call), backend)
    return _forward(*call, backend)


def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
    """Check the contract; the arguments of the raw op (under autocast without their history)."""
    if checks.autocast_is_on(x.device.type):
        x, weight, bias = checks.autocast_detached("linear", x, weight, bias)
    checks.linear("linear", x, weight, bias)
    return x, weight, bias


class _Linear(torch.autograd.Function):
    """The gradients go to the first three arguments; after them comes what autocast took instead."""

    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[override]
        originals, others, backend = arguments[:3], arguments[3:6], arguments[6]
        x, weight, bias = gradients.taken_of(originals, others)
        ctx.backend = backend
        ctx.dtypes, ctx.gradient_dtype = gradients.dtypes_of(*originals), gradients.dtype_of(originals[1], weight)
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias, backend)

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        made = _backward(dy, x, weight, needs, ctx.gradient_dtype, ctx.backend)
        return (*gradients.given_back(ctx.dtypes, made, needs), None, None, None, None)


_apply = library.apply_of(_Linear)


def _forward_impl(x, weight, bias, backend):
    return registry.implementation("linear", backend).forward(x, weight, bias)


def _forward_fake(x, weight, bias, backend):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward_impl(dy, x, weight, needs, dtype, backend):
    return registry.implementation("linear", backend).backward(dy, x, weight, needs, dtype)


def _backward_fake(dy, x, weight, needs, dtype, backend):
    return (
        x.new_empty(x.shape if needs[0] else 0),
        x.new_empty(weight.shape if needs[1] else 0, dtype=dtype),
        x.new_empty(weight.shape[0] if needs[2] else 0, dtype=dtype),
    )


_forward = library.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor", _forward_impl, _forward_fake
)
# dx, and in `dtype` (x's or float32) dweight and dbias; each empty where its element of `needs` is false
_backward = library.define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool[] needs, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)

registry.register("linear", _prepare, reference=reference, cpu=native, cuda=cuda, triton=triton)
