"""One step of AdamW, in place, in one pass over the parameters, their gradients and their moments.

Loshchilov, Hutter: Decoupled Weight Decay Regularization (arXiv:1711.05101).
Reddi, Kale, Kumar: On the Convergence of Adam and Beyond (AMSGrad, arXiv:1904.09237).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastlm.ops import checks, library, registry
from fastlm.ops.adamw import cuda, native, reference, triton


@library.untraced
@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None] | None = None,
    masters: Sequence[Tensor | None] | None = None,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: float | Tensor = 1.0,
    maximize: bool = False,
) -> None:
    """Update a list of parameters and their moments in place; `fastlm.optim.AdamW` is the optimizer around it.

        g = grad_scale * grad                                     (negated where maximize)
        p = p - lr * weight_decay * p
        m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g²
        p = p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

    Args:
        params: float32, bfloat16, float16 or float64, all on one device; any shapes and strides.
        grads: one for each parameter, of its shape; any strides and any of these dtypes.
        exp_avgs: the first moments m: the parameter's shape, contiguous, float32 (float64 for a float64 parameter).
        exp_avg_sqs: the second moments v, likewise.
        max_exp_avg_sqs: the largest v so far, likewise, which AMSGrad divides by instead of v; None: no AMSGrad.
        masters: for each parameter a contiguous float32 copy that is updated in its place and then rounded into it,
            or None.
        step: the number of this step, counted from 1.
        grad_scale: every gradient is multiplied by it first (clipping, loss scaling): a number, or a tensor of one
            element on the parameters' device, which is not waited for.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit together.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    if max_exp_avg_sqs is None and masters is None and len(params) > 0:
        rows = native.table_of(params, grads, exp_avgs, exp_avg_sqs)
        if rows is not None:
            _check_step(params[0], step, grad_scale)
            module = cuda if params[0].is_cuda else native
            module.step_rows(*rows, params[0], step, lr, beta1, beta2, eps, weight_decay, grad_scale, maximize)
            increment_version(params)
            return
    call = _prepare(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        masters,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        maximize=maximize,
    )
    if len(params) == 0:
        return
    backend = registry.choose("adamw", params[0].device.type, call)
    registry.implementation("adamw", backend).step(*call)
    increment_version(params)  # what a graph has saved of them is no longer that


def _prepare(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None] | None = None,
    masters: Sequence[Tensor | None] | None = None,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: float | Tensor = 1.0,
    maximize: bool = False,
) -> tuple:
    """Check the contract; the arguments of a backend's `step`."""
    count = len(params)
    max_exp_avg_sqs = [None] * count if max_exp_avg_sqs is None else max_exp_avg_sqs
    masters = [None] * count if masters is None else masters
    states = {
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "max_exp_avg_sqs": max_exp_avg_sqs,
        "masters": masters,
    }
    for name, tensors in {"grads": grads, **states}.items():
        if len(tensors) != count:
            raise ValueError(f"adamw: {name} must hold one tensor for each of the {count} params, got {len(tensors)}")
    if count > 0:
        _check_step(params[0], step, grad_scale)
    for i, p in enumerate(params):
        if p.dtype not in checks.FLOATS:
            checks.floating("adamw", **{f"params[{i}]": p})
        if p.device != params[0].device:
            checks.same_device("adamw", "params[0]", params[0], **{f"params[{i}]": p})
        _check_gradient(i, p, grads[i])
        wide = checks.statistics_dtype(p)
        for name, tensors in states.items():
            t = tensors[i]
            if t is not None and (
                t.shape != p.shape or t.dtype != wide or t.device != p.device or not t.is_contiguous()
            ):
                _check_state(f"{name}[{i}]", p, t, wide)
    return (
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        masters,
        int(step),
        float(lr),
        float(beta1),
        float(beta2),
        float(eps),
        float(weight_decay),
        grad_scale if isinstance(grad_scale, Tensor) else float(grad_scale),
        bool(maximize),
    )


def _check_step(first: Tensor, step: int, grad_scale: float | Tensor) -> None:
    if isinstance(grad_scale, Tensor) and (grad_scale.numel() != 1 or grad_scale.device != first.device):
        raise ValueError(
            f"adamw: a tensor grad_scale must have one element and be on {first.device} like the params,"
            f" got shape {tuple(grad_scale.shape)} on {grad_scale.device}"
        )
    if step < 1:
        raise ValueError(f"adamw: step is counted from 1, got {step}")


def _check_gradient(i: int, p: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise ValueError(f"adamw: grads[{i}] is sparse ({grad.layout}); only dense gradients are supported")
    if grad.shape != p.shape:
        checks.shape("adamw", f"grads[{i}]", grad, p.shape, f"of params[{i}]")
    if grad.dtype not in checks.FLOATS:
        checks.floating("adamw", **{f"grads[{i}]": grad})
    if grad.device != p.device:
        checks.same_device("adamw", f"params[{i}]", p, **{f"grads[{i}]": grad})


def _check_state(name: str, p: Tensor, t: Tensor, wide: torch.dtype) -> None:
    if t.shape != p.shape:
        checks.shape("adamw", name, t, p.shape, "of its parameter")
    if t.dtype != wide:
        raise ValueError(f"adamw: {name} must be {wide} beside a {p.dtype} parameter, got {t.dtype}")
    if t.device != p.device:
        raise ValueError(f"adamw: {name} is on {t.device}, but its parameter is on {p.device}")
    if not t.is_contiguous():
        raise ValueError(f"adamw: {name} must be contiguous, got shape {tuple(t.shape)} with strides {t.stride()}")


registry.register("adamw", _prepare, reference=reference, cpu=native, cuda=cuda, triton=triton)
