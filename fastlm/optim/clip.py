"""The norm of all gradients together, and the factor that clips it.

torch.nn.utils.clip_grad_norm_ reads every gradient for the norm and writes it back scaled. Here the gradients are only
read: the factor goes to the optimizer's step, which multiplies while it reads them anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops import checks
from fastlm.ops.grad_norm import grad_norm


class GradNorm(NamedTuple):
    norm: Tensor  # () the 2-norm of all gradients together, before clipping
    scale: Tensor  # () what every gradient is to be multiplied by: at most 1; NaN where the norm is not finite


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> GradNorm:
    """The norm of the gradients and the factor that brings it down to `max_norm`; the gradients are left as they are.

        norm, scale = fastlm.optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step(grad_scale=scale)

    Both stay on the gradients' device, and nothing waits for it. The squares are summed in float32 (float64 for float64
    gradients) in an order that does not depend on the number of threads. The factor is that of
    torch.nn.utils.clip_grad_norm_, min(1, max_norm / (norm + 1e-6)). A NaN or infinite gradient makes the factor NaN,
    and a step with it would spoil the parameters: test `norm.isfinite()` first where that can happen. `max_norm` may be
    infinite: then only the norm is of interest, and the factor is 1.

    Raises:
        ValueError: max_norm is not positive, or a gradient is sparse.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm must be positive, got {max_norm}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return GradNorm(torch.zeros(()), torch.ones(()))
    for g in gradients:
        if g.layout != torch.strided:
            raise ValueError(f"clip_grad_norm: a gradient of shape {tuple(g.shape)} is sparse ({g.layout})")
    if any(type(g) not in checks.PLAIN for g in gradients):
        return _sharded(gradients, max_norm)
    return GradNorm(*grad_norm(gradients, max_norm))


def _sharded(gradients: list[Tensor], max_norm: float) -> GradNorm:
    """Of gradients whose parts other processes have (DTensors): torch's norm, which asks them."""
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return GradNorm(norm, torch.where(norm.isfinite(), scale, torch.full_like(scale, torch.nan)))
