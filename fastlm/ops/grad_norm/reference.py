"""The norm of gradients in plain PyTorch: the oracle of every other backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.ops.checks import statistics_dtype

# Each row of this many elements is summed by one thread, and a column of rows is too short for torch to share it out.
# With one sum over a whole tensor, the threads would each take a part, and their number would decide the rounding.
_ROW = 4096


def unsupported(*call: Any) -> str | None:
    return None


def norm(gradients: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    norms = [_norm(g) for g in gradients]
    total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    return total, torch.where(total.isfinite(), scale, torch.full_like(scale, torch.nan))


def _norm(g: Tensor) -> Tensor:
    dtype = statistics_dtype(g)
    flat = g.reshape(-1)
    while flat.numel() > _ROW:
        whole = flat.numel() // _ROW * _ROW
        rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=dtype)
        rest = torch.linalg.vector_norm(flat[whole:], dtype=dtype)
        flat = torch.cat([rows, rest[None]])
    return torch.linalg.vector_norm(flat, dtype=dtype)
