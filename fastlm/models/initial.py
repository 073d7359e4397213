"""The weights that models begin with."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def init_normal(model: nn.Module, std: float, into_residual: float | None = None) -> None:
    """Matrices and tables from N(0, std²), biases 0, the weights of norms 1.

    Args:
        into_residual: the standard deviation of the projections that end in the residual stream; None: std.
    """
    into_residual = std if into_residual is None else into_residual
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.dim() < 2:
            nn.init.ones_(p)
        else:
            nn.init.normal_(p, std=into_residual if name.endswith("proj.weight") else std)
