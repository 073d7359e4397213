"""The MLP block in plain PyTorch, backward spelled out: the oracle of every other backend.

Matrix products are in the inputs' dtype; what is elementwise is computed in float32 (PyTorch's own activations do so
inside for bfloat16 and float16, so they need no float32 copy). The backward pass keeps only the pre-activation and
computes the activation once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops import memory
from fastlm.ops.checks import autocast_off, statistics_dtype
from fastlm.ops.linear.reference import backward as linear_backward

GATED = {"swiglu": "silu", "geglu": "gelu"}  # gated activation -> the activation of its gate
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "relu2", "silu", *GATED)


def unsupported(*call: object) -> str | None:
    return None


def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    with autocast_off(x):
        pre = F.linear(x, weight, bias)  # (..., F), gated (..., 2F)
        return activate(pre, activation), pre if keep else pre.new_empty(0)


def linear_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    with autocast_off(x):
        dpre = activate_backward(dy, pre, activation)
        return linear_backward(dpre, x, weight, needs, dtype)


def mlp_forward(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    hidden, pre = linear_act_forward(x, fc_weight, fc_bias, activation, keep)
    with autocast_off(x):
        y = F.linear(hidden, proj_weight, proj_bias)
    return memory.reshaped(y, *y.shape), pre


def mlp_backward(
    dy: Tensor,
    x: Tensor,
    fc_weight: Tensor,
    proj_weight: Tensor,
    pre: Tensor,
    activation: str,
    needs: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with autocast_off(x):
        needs_fc, needs_proj = needs[:3], needs[3:]
        hidden = activate(pre, activation) if needs_proj[0] else pre
        needs_hidden = [any(needs_fc), *needs_proj]
        dhidden, dproj_weight, dproj_bias = linear_backward(dy, hidden, proj_weight, needs_hidden, dtype)
        del hidden
        if not any(needs_fc):
            none = x.new_empty(0)
            return none, none.to(dtype, copy=True), none.to(dtype, copy=True), dproj_weight, dproj_bias
        dpre = activate_backward(dhidden, pre, activation)
        del dhidden
        return (*linear_backward(dpre, x, fc_weight, needs_fc, dtype), dproj_weight, dproj_bias)


def activate(pre: Tensor, activation: str) -> Tensor:
    """act(pre), (..., F); for a gated activation act(gate) * up, from (..., 2F)."""
    if activation not in GATED:
        return _act(pre, activation)
    gate, up = pre.chunk(2, -1)
    return _act(gate.to(statistics_dtype(pre)), GATED[activation]).mul_(up).to(pre.dtype)


def activate_backward(dy: Tensor, pre: Tensor, activation: str) -> Tensor:
    """The gradient of the pre-activation, from that of the activation."""
    if activation not in GATED:
        return _act_backward(dy, pre, activation)
    gate, up = (half.to(statistics_dtype(pre)) for half in pre.chunk(2, -1))
    dpre = torch.empty_like(pre)
    dgate, dup = dpre.chunk(2, -1)
    dup.copy_(_act(gate, GATED[activation]).mul_(dy))
    dgate.copy_(_act_backward(dy * up, gate, GATED[activation]))
    return dpre


def _act(h: Tensor, activation: str) -> Tensor:
    if activation == "gelu_tanh":  # 0.5 h (1 + tanh(sqrt(2/pi) (h + 0.044715 h³)))
        return F.gelu(h, approximate="tanh")
    if activation == "gelu":  # 0.5 h (1 + erf(h / sqrt(2)))
        return F.gelu(h)
    if activation == "silu":  # h / (1 + exp(-h))
        return F.silu(h)
    positive = F.relu(h)
    return positive.square_() if activation == "relu2" else positive


def _act_backward(dy: Tensor, h: Tensor, activation: str) -> Tensor:
    """dy * act'(h)."""
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(dy, h, approximate="tanh")
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dy, h)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, h)
    if activation == "relu2":
        return F.relu(h).mul_(dy).mul_(2)
    return torch.where(h > 0, dy, 0)
