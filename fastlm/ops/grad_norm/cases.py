"""Benchmark cases of the norm of gradients. It takes a list of tensors: test_optim.py tests it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.ops.adamw.cases import MATRICES, VECTORS
from fastlm.ops.case import Case, Maker


def eager_grad_norm(gradients: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """What torch.nn.utils.clip_grad_norm_ computes before it scales."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm, torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def _build(make: Maker) -> dict:
    return {"gradients": [make.randn(*s, scale=1e-3) for s in (MATRICES + VECTORS) * 4], "max_norm": 1.0}


CASES = [Case("grad_norm", "28M", _build, eager_grad_norm, bench=True, traits=frozenset({"forward"}))]
