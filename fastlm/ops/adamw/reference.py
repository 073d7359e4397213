"""AdamW in plain PyTorch, one tensor after the other: the oracle of every other backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def unsupported(*call: Any) -> str | None:
    return None


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None],
    masters: Sequence[Tensor | None],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
    maximize: bool,
) -> None:
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for p, grad, m, v, v_max, master in zip(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, strict=True
    ):
        g = grad.to(m.dtype) * (-grad_scale if maximize else grad_scale)
        w = p.to(m.dtype) if master is None else master
        w = w * (1 - lr * weight_decay)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if v_max is not None:
            torch.maximum(v_max, v, out=v_max)
        denominator = ((v if v_max is None else v_max) / correction2).sqrt() + eps
        w = w - (lr / correction1) * (m / denominator)
        if master is not None:
            master.copy_(w)
        p.copy_(w)
