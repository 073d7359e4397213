"""The norm of all gradients together, and the factor that clips it, in one pass that only reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.ops import checks, library, registry
from fastlm.ops.grad_norm import cuda, native, reference, triton


@library.untraced
@torch.no_grad()
def grad_norm(gradients: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """The 2-norm of all tensors together, and min(1, max_norm / (norm + 1e-6)).

    Args:
        gradients: at least one; any shapes and strides, float32, bfloat16, float16 or float64. On several devices: on
            the reference backend alone.
        max_norm: positive; may be infinite.

    Returns:
        norm and factor, each a tensor of no dimensions on the first gradient's device, float32 (float64 where a
        gradient is), without a gradient of its own. The factor is NaN where the norm is not finite. Squares are summed
        in float32 in an order that follows from the shapes alone; on CUDA nothing waits for the device.

    Raises:
        ValueError: there is no gradient, one is sparse, or max_norm is not positive.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    call = _prepare(gradients, max_norm)
    checks.refuse_tangents("grad_norm", *gradients)
    backend = registry.choose("grad_norm", gradients[0].device.type, call)
    return registry.implementation("grad_norm", backend).norm(*call)


def _prepare(gradients: Sequence[Tensor], max_norm: float) -> tuple:
    op = "grad_norm"
    if not max_norm > 0:
        raise ValueError(f"{op}: max_norm must be positive, got {max_norm}")
    if len(gradients) == 0:
        raise ValueError(f"{op}: wanted at least one gradient, got none")
    for g in gradients:
        if g.layout != torch.strided:
            raise ValueError(f"{op}: a gradient of shape {tuple(g.shape)} is sparse ({g.layout})")
        if g.dtype not in checks.FLOATS:
            checks.floating(op, gradients=g)
    return gradients, float(max_norm)


registry.register("grad_norm", _prepare, reference=reference, cpu=native, cuda=cuda, triton=triton)
