"""The loss of a language-model head, without ever holding all its logits.

Wijmans et al.: Cut Your Losses in Large-Vocabulary Language Models (arXiv:2411.09009). Hsu et al.: Liger Kernel
(arXiv:2410.10989). Szegedy et al.: label smoothing (arXiv:1512.00567). Chowdhery et al.: PaLM (the z loss,
arXiv:2204.02311). Gemma 2 (the soft cap, arXiv:2408.00118).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import checks, library, registry
from fastlm.ops.linear_cross_entropy import cuda, native, reference, triton

REDUCTIONS = ("mean", "sum", "none")
IGNORED = -100  # a target that is left out of the loss, as in torch.nn.functional.cross_entropy


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """Cross-entropy of the logits x @ weight.T, made block by block: F.cross_entropy(F.linear(x, weight), targets).

    For each row: z = x @ weight.T, with a soft cap z = softcap * tanh(z / softcap); lse = log(sum(exp(z)));
    loss = lse - (1 - label_smoothing) * z[target] - label_smoothing * mean(z) + z_loss * lse².

    Args:
        x: (..., C), float32, bfloat16 or float16 (float64 on the reference backend); any strides.
        weight: (V, C), x's dtype.
        targets: (...), int64: the classes, 0 to V - 1, or ignore_index.
        ignore_index: rows with this target have loss 0 and no gradient, and do not count in the mean.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        label_smoothing: 0 to 1, as in F.cross_entropy.
        z_loss: weight of the squared log of the normaliser, which keeps it near 0; part of the mean.
        softcap: the logits' bound; 0 for none.

    Returns:
        The loss in float32 (float64 for float64): a scalar, or (...) for "none". The mean over no row at all is NaN, as
        in F.cross_entropy; its gradient is zero. Products are in x's dtype, everything else in float32. Under autocast
        x and weight are taken in the autocast dtype, and dweight reaches a float32 weight unrounded.
        For "mean" and "sum" the gradients are made in the forward pass, where they are needed: beside x, weight and
        these, memory does not grow with V times the number of rows. "none" computes the logits again in the backward.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit.
        IndexError: on the CPU, a target outside the vocabulary. On another device this would have to wait for it:
            there such a row's loss and gradient are NaN.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    call = _prepare(
        x,
        weight,
        targets,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    backend = registry.choose("linear_cross_entropy", x.device.type, call)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _apply(x, weight, *call, backend)
    return _forward(*call, [False, False], backend)[0]


def _prepare(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple:
    """Check the contract; the arguments of the raw op (x and weight without their history)."""
    op = "linear_cross_entropy"
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must have shape (V, C), C = {x.shape[-1]} as in x of shape {tuple(x.shape)},"
            f" got {tuple(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"{op}: weight must not be empty, got shape {tuple(weight.shape)}")
    checks.shape(op, "targets", targets, x.shape[:-1], "that of x without its last dimension")
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets must be int64, got {targets.dtype}")
    checks.floating(op, x=x, weight=weight)
    checks.same_device(op, "x", x, weight=weight, targets=targets)
    low_x, low_weight = checks.autocast(*checks.detached(op, x, weight))
    checks.same_dtype(op, "x", low_x, weight=low_weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    for name, value in (("z_loss", z_loss), ("softcap", softcap)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{op}: {name} must be finite and not negative, got {value}")
    options = reduction, int(ignore_index), float(label_smoothing), float(z_loss), float(softcap)
    return low_x, low_weight, targets, *options


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients go to x_leaf and weight_leaf; x and weight are the same, in the dtype of the products."""

    @staticmethod
    def forward(ctx, x_leaf, weight_leaf, x, weight, targets, reduction, *rest):  # type: ignore[override]
        *options, backend = rest
        needs = list(ctx.needs_input_grad[:2])
        loss, lse, dx, dweight = _forward(x, weight, targets, reduction, *options, needs, backend)
        ctx.reduction, ctx.options, ctx.backend = reduction, options, backend
        ctx.dtypes = x_leaf.dtype, weight_leaf.dtype
        if reduction == "none":
            ctx.save_for_backward(x, weight, targets, lse)
        else:
            ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dloss):  # type: ignore[override]
        needs = list(ctx.needs_input_grad[:2])
        if ctx.reduction == "none":
            gradients = list(_backward(dloss, *ctx.saved_tensors, *ctx.options, needs, ctx.backend))
        else:
            gradients = list(ctx.saved_tensors)
            # Nearly always dloss is 1, and dweight is the largest tensor of the model: no pass over it for nothing.
            # (On a GPU to look would mean to wait; in a compiled graph, to break it.)
            kept = library.watched() or library.graph_is_kept()  # a later pass reads what is saved
            if torch.compiler.is_compiling() or dloss.device.type != "cpu" or dloss.item() != 1:
                gradients = [g * dloss if kept else g.mul_(dloss) for g in gradients]
            elif kept:
                gradients = [g.clone() for g in gradients]
        given = [g.to(dtype) if need else None for g, dtype, need in zip(gradients, ctx.dtypes, needs, strict=True)]
        return (*given, *[None] * 9)


_apply = library.apply_of(_LinearCrossEntropy)


def _forward_impl(x, weight, targets, reduction, ignore_index, label_smoothing, z_loss, softcap, needs, backend):
    implementation = registry.implementation("linear_cross_entropy", backend)
    return implementation.forward(x, weight, targets, reduction, ignore_index, label_smoothing, z_loss, softcap, needs)


def _forward_fake(x, weight, targets, reduction, ignore_index, label_smoothing, z_loss, softcap, needs, backend):
    wide = checks.statistics_dtype(x)
    leading = targets.shape if reduction == "none" else ()
    made = [need and reduction != "none" for need in needs]
    return (
        x.new_empty(leading, dtype=wide),
        x.new_empty(leading if reduction == "none" else (0,), dtype=wide),
        x.new_empty(x.shape if made[0] else (0,), dtype=wide),
        x.new_empty(weight.shape if made[1] else (0,), dtype=wide),
    )


def _backward_impl(dloss, x, weight, targets, lse, ignore_index, label_smoothing, z_loss, softcap, needs, backend):
    implementation = registry.implementation("linear_cross_entropy", backend)
    return implementation.backward(
        dloss, x, weight, targets, lse, ignore_index, label_smoothing, z_loss, softcap, needs
    )


def _backward_fake(dloss, x, weight, targets, lse, ignore_index, label_smoothing, z_loss, softcap, needs, backend):
    return (
        x.new_empty(x.shape if needs[0] else (0,), dtype=lse.dtype),
        x.new_empty(weight.shape if needs[1] else (0,), dtype=lse.dtype),
    )


# loss; lse (empty but for "none"); dx and dweight in float32 for a gradient of 1 of the loss (empty for "none", and
# where their element of `needs` is false)
_forward = library.define(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor targets, str reduction, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
# dx and dweight in float32, for reduction "none"; each empty where its element of `needs` is false
_backward = library.define(
    "linear_cross_entropy_backward(Tensor dloss, Tensor x, Tensor weight, Tensor targets, Tensor lse,"
    " int ignore_index, float label_smoothing, float z_loss, float softcap, bool[] needs, str backend)"
    " -> (Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)

registry.register("linear_cross_entropy", _prepare, reference=reference, cpu=native, cuda=cuda, triton=triton)
