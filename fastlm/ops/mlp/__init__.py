"""The MLP block of a transformer, and its first half: a linear layer with an activation.

Hendrycks, Gimpel: Gaussian Error Linear Units (arXiv:1606.08415).
So et al.: Primer, searching for efficient transformers (relu², arXiv:2109.08668).
Shazeer: GLU Variants Improve Transformer (swiglu, geglu, arXiv:2002.05202).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.hints import did_you_mean
from fastlm.ops import checks, gradients, library, registry
from fastlm.ops.mlp import cuda, native, reference, triton
from fastlm.ops.mlp.reference import ACTIVATIONS, GATED


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """A linear layer and its activation: act(x @ weight.T + bias).

    Args:
        x: (..., C), float32, bfloat16 or float16 (float64 on the reference backend); any strides.
        weight: (F, C), x's dtype; for a gated activation (2F, C), the F rows of the gate first, then the F rows that
            it multiplies ("up").
        bias: (F), gated (2F), x's dtype, or None.
        activation: "gelu_tanh" (GPT-2's), "gelu" (with erf), "relu", "relu2" (relu squared), "silu"; gated:
            "swiglu" = silu(gate) * up, "geglu" = gelu(gate) * up with erf, as Shazeer defines it.

    Returns:
        (..., F) in x's dtype. Products are in x's dtype, elementwise arithmetic in float32. Under autocast all inputs
        are taken in the autocast dtype, and gradients reach float32 weights and biases unrounded. For the backward pass
        only x and the pre-activation are kept.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or there is no such activation.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    call = _prepare_linear_act(x, weight, bias, activation=activation)
    backend = registry.choose("linear_act", x.device.type, call)
    tensors = x, weight, bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _apply_linear_act(*tensors, *gradients.others(tensors, call[:3]), activation, backend)
    return _linear_act_forward(*call, False, backend)[0]


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
) -> Tensor:
    """The MLP block: act(x @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias.

    Args:
        x: (..., C), float32, bfloat16 or float16 (float64 on the reference backend); any strides.
        fc_weight: (F, C), gated (2F, C), as `linear_act`'s weight.
        fc_bias: (F), gated (2F), or None.
        proj_weight: (C_out, F).
        proj_bias: (C_out), or None.
        activation: as for `linear_act`.

    Returns:
        (..., C_out) in x's dtype; dtypes, autocast and errors as for `linear_act`. For the backward pass only x and
        the pre-activation are kept: the activation is computed again.
    """
    call = _prepare_mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, activation=activation)
    backend = registry.choose("mlp", x.device.type, call)
    tensors = x, fc_weight, fc_bias, proj_weight, proj_bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _apply_mlp(*tensors, *gradients.others(tensors, call[:5]), activation, backend)
    return _mlp_forward(*call, False, backend)[0]


def _check_activation(op: str, activation: str) -> bool:
    """True where the activation is gated; ValueError where there is no such one."""
    if activation not in ACTIVATIONS:
        hint = did_you_mean(activation, ACTIVATIONS)
        raise ValueError(f"{op}: there is no activation {activation!r}{hint}; wanted one of {', '.join(ACTIVATIONS)}")
    return activation in GATED


def _prepare_linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str) -> tuple:
    """Check the contract; the arguments of the raw op (under autocast without their history)."""
    gated = _check_activation("linear_act", activation)
    x, weight, bias = checks.autocast_detached("linear_act", x, weight, bias)
    checks.linear("linear_act", x, weight, bias, gated=gated)
    return x, weight, bias, activation


def _prepare_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
) -> tuple:
    gated = _check_activation("mlp", activation)
    tensors = checks.autocast_detached("mlp", x, fc_weight, fc_bias, proj_weight, proj_bias)
    x, fc_weight, fc_bias, proj_weight, proj_bias = tensors
    checks.linear("mlp", x, fc_weight, fc_bias, prefix="fc_", gated=gated)
    hidden = fc_weight.shape[0] // 2 if gated else fc_weight.shape[0]
    if proj_weight.dim() != 2 or proj_weight.shape[1] != hidden:
        rows = f"half the {fc_weight.shape[0]} rows" if gated else "the rows"
        raise ValueError(
            f"mlp: proj_weight must have shape (C_out, F), F = {hidden} as {rows} of fc_weight,"
            f" got {tuple(proj_weight.shape)}"
        )
    if proj_weight.shape[0] == 0:
        raise ValueError(f"mlp: proj_weight must not be empty, got shape {tuple(proj_weight.shape)}")
    if proj_bias is not None and proj_bias.shape != proj_weight.shape[:1]:
        checks.shape("mlp", "proj_bias", proj_bias, (proj_weight.shape[0],), "(C_out)")
    if not checks.alike(x, proj_weight, proj_bias):
        checks.same_device("mlp", "x", x, proj_weight=proj_weight, proj_bias=proj_bias)
        checks.same_dtype("mlp", "x", x, proj_weight=proj_weight, proj_bias=proj_bias)
    return x, fc_weight, fc_bias, proj_weight, proj_bias, activation


class _LinearAct(torch.autograd.Function):
    """The gradients go to the first three arguments; after them comes what autocast took instead."""

    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[override]
        originals, others, (activation, backend) = arguments[:3], arguments[3:6], arguments[6:]
        x, weight, bias = gradients.taken_of(originals, others)
        y, pre = _linear_act_forward(x, weight, bias, activation, True, backend)
        ctx.activation, ctx.backend = activation, backend
        ctx.dtypes, ctx.gradient_dtype = gradients.dtypes_of(*originals), gradients.dtype_of(originals[1], weight)
        ctx.save_for_backward(x, weight, pre)
        return y

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, weight, pre = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        options = ctx.activation, needs, ctx.gradient_dtype, ctx.backend
        made = _linear_act_backward(dy, x, weight, pre, *options)
        return (*gradients.given_back(ctx.dtypes, made, needs), *[None] * 5)


_apply_linear_act = library.apply_of(_LinearAct)


class _MLP(torch.autograd.Function):
    """As _LinearAct, of five."""

    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[override]
        originals, others, (activation, backend) = arguments[:5], arguments[5:10], arguments[10:]
        tensors = gradients.taken_of(originals, others)
        y, pre = _mlp_forward(*tensors, activation, True, backend)
        x, fc_weight, _, proj_weight, _ = tensors
        ctx.activation, ctx.backend = activation, backend
        ctx.dtypes, ctx.gradient_dtype = gradients.dtypes_of(*originals), gradients.dtype_of(originals[1], fc_weight)
        ctx.save_for_backward(x, fc_weight, proj_weight, pre)
        return y

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, fc_weight, proj_weight, pre = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        options = ctx.activation, needs, ctx.gradient_dtype, ctx.backend
        made = _mlp_backward(dy, x, fc_weight, proj_weight, pre, *options)
        return (*gradients.given_back(ctx.dtypes, made, needs), *[None] * 7)


_apply_mlp = library.apply_of(_MLP)


def _linear_act_forward_impl(x, weight, bias, activation, keep, backend):
    return registry.implementation("linear_act", backend).linear_act_forward(x, weight, bias, activation, keep)


def _linear_act_forward_fake(x, weight, bias, activation, keep, backend):
    rows = weight.shape[0]
    leading = x.shape[:-1]
    y = x.new_empty((*leading, rows // 2 if activation in GATED else rows))
    return y, x.new_empty((*leading, rows) if keep else (0,))


def _linear_act_backward_impl(dy, x, weight, pre, activation, needs, dtype, backend):
    implementation = registry.implementation("linear_act", backend)
    return implementation.linear_act_backward(dy, x, weight, pre, activation, needs, dtype)


def _linear_act_backward_fake(dy, x, weight, pre, activation, needs, dtype, backend):
    return (
        x.new_empty(x.shape if needs[0] else 0),
        x.new_empty(weight.shape if needs[1] else 0, dtype=dtype),
        x.new_empty(weight.shape[0] if needs[2] else 0, dtype=dtype),
    )


def _mlp_forward_impl(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, keep, backend):
    implementation = registry.implementation("mlp", backend)
    return implementation.mlp_forward(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, keep)


def _mlp_forward_fake(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, keep, backend):
    leading = x.shape[:-1]
    pre = x.new_empty((*leading, fc_weight.shape[0]) if keep else (0,))
    return x.new_empty((*leading, proj_weight.shape[0])), pre


def _mlp_backward_impl(dy, x, fc_weight, proj_weight, pre, activation, needs, dtype, backend):
    implementation = registry.implementation("mlp", backend)
    return implementation.mlp_backward(dy, x, fc_weight, proj_weight, pre, activation, needs, dtype)


def _mlp_backward_fake(dy, x, fc_weight, proj_weight, pre, activation, needs, dtype, backend):
    return (
        x.new_empty(x.shape if needs[0] else 0),
        x.new_empty(fc_weight.shape if needs[1] else 0, dtype=dtype),
        x.new_empty(fc_weight.shape[0] if needs[2] else 0, dtype=dtype),
        x.new_empty(proj_weight.shape if needs[3] else 0, dtype=dtype),
        x.new_empty(proj_weight.shape[0] if needs[4] else 0, dtype=dtype),
    )


# y, pre-activation (empty unless `keep`)
_linear_act_forward = library.define(
    "linear_act_forward(Tensor x, Tensor weight, Tensor? bias, str activation, bool keep, str backend)"
    " -> (Tensor, Tensor)",
    _linear_act_forward_impl,
    _linear_act_forward_fake,
)
# dx, and in `dtype` (x's or float32) dweight and dbias; each empty where its element of `needs` is false
_linear_act_backward = library.define(
    "linear_act_backward(Tensor dy, Tensor x, Tensor weight, Tensor pre, str activation, bool[] needs,"
    " ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor)",
    _linear_act_backward_impl,
    _linear_act_backward_fake,
)
# y, pre-activation (empty unless `keep`)
_mlp_forward = library.define(
    "mlp_forward(Tensor x, Tensor fc_weight, Tensor? fc_bias, Tensor proj_weight, Tensor? proj_bias, str activation,"
    " bool keep, str backend) -> (Tensor, Tensor)",
    _mlp_forward_impl,
    _mlp_forward_fake,
)
# dx, and in `dtype` (x's or float32) those of weights and biases; each empty where its element of `needs` is false
_mlp_backward = library.define(
    "mlp_backward(Tensor dy, Tensor x, Tensor fc_weight, Tensor proj_weight, Tensor pre, str activation, bool[] needs,"
    " ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mlp_backward_impl,
    _mlp_backward_fake,
)

registry.register("linear_act", _prepare_linear_act, reference=reference, cpu=native, cuda=cuda, triton=triton)
registry.register("mlp", _prepare_mlp, reference=reference, cpu=native, cuda=cuda, triton=triton)
