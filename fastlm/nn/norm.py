"""LayerNorm and RMSNorm as modules, with the residual addition in front."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlm import ops


class LayerNorm(nn.Module):
    """`fastlm.ops.layer_norm` with its parameters; they have the names and the start of `torch.nn.LayerNorm`'s."""

    def __init__(self, size: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., C): its norm; with a residual (..., C), the norm of h = x + residual, and h."""
        if residual is None:
            return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"


class RMSNorm(nn.Module):
    """`fastlm.ops.rms_norm` with its parameter, named as `torch.nn.RMSNorm`'s."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., C): its norm; with a residual (..., C), the norm of h = x + residual, and h."""
        if residual is None:
            return ops.rms_norm(x, self.weight, eps=self.eps)
        return ops.rms_norm(x, self.weight, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
