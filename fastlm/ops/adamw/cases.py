"""Benchmark cases of the optimizer's step. It works in place, unlike the ops of the suite: test_optim.py tests it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastlm.ops.case import Case, Maker

# The parameters of one GPT-2 124M block.
MATRICES = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
VECTORS = [(768,)] * 6 + [(2304,), (3072,)]


def eager_adamw_(params, grads, exp_avgs, exp_avg_sqs, *, step, lr, weight_decay):
    """torch.optim.AdamW, one tensor after the other, an operation at a time."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g.to(m.dtype), 1 - beta1)
        v.mul_(beta2).addcmul_(g.to(v.dtype), g.to(v.dtype), value=1 - beta2)
        denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        p.sub_(((lr / (1 - beta1**step)) * (m / denominator)).to(p.dtype))


def _build(blocks: int) -> Callable[[Maker], dict]:
    def build(make: Maker) -> dict:
        shapes = (MATRICES + VECTORS) * blocks
        wide = torch.float64 if make.dtype == torch.float64 else torch.float32
        return {
            "params": [make.randn(*s, scale=0.02) for s in shapes],
            "grads": [make.randn(*s, scale=1e-3) for s in shapes],
            "exp_avgs": [make.randn(*s, scale=1e-3, dtype=wide) for s in shapes],
            "exp_avg_sqs": [make.randn(*s, scale=1e-3, dtype=wide).square() for s in shapes],
            "step": 10,
            "lr": 1e-3,
            "weight_decay": 0.1,
        }

    return build


CASES = [Case("adamw_", "28M", _build(4), eager_adamw_, bench=True, traits=frozenset({"in-place"}))]
