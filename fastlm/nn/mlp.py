"""The MLP of a block as a module."""

from __future__ import annotations

from torch import Tensor, nn

from fastlm import ops
from fastlm.nn.lora import effective_weight
from fastlm.ops.mlp.reference import ACTIVATIONS, GATED

__all__ = ["ACTIVATIONS", "GATED", "MLP"]


class MLP(nn.Module):
    """proj(act(fc(x))), or, gated, proj(act(gate(x)) * up(x)) with `fc` holding gate's rows first, then up's."""

    def __init__(self, n_embd: int, hidden_size: int, activation: str = "gelu_tanh", bias: bool = True) -> None:
        super().__init__()
        self.activation = activation
        self.fc = nn.Linear(n_embd, hidden_size * (2 if activation in GATED else 1), bias=bias)
        self.proj = nn.Linear(hidden_size, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C); under autocast in its dtype, else in x's."""
        fc_weight, proj_weight = effective_weight(self.fc), effective_weight(self.proj)
        return ops.mlp(x, fc_weight, self.fc.bias, proj_weight, self.proj.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
