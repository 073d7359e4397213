"""Cases of linear_act and mlp, for tests and benchmarks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastlm.ops.case import Case, Maker
from fastlm.ops.mlp.reference import ACTIVATIONS, GATED

_PLAIN = {
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "silu": F.silu,
}


def eager_linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str) -> Tensor:
    h = F.linear(x, weight, bias)
    if activation not in GATED:
        return _PLAIN[activation](h)
    gate, up = h.chunk(2, -1)
    return _PLAIN[GATED[activation]](gate) * up


def eager_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
) -> Tensor:
    return F.linear(eager_linear_act(x, fc_weight, fc_bias, activation=activation), proj_weight, proj_bias)


def _inputs(make: Maker, shape: tuple[int, ...], layout: str, scale: float) -> Tensor:
    if layout == "sliced":  # rows further apart than they are long, and not 16-byte aligned
        return make.randn(*shape[:-1], 2 * shape[-1] + 1, scale=scale)[..., 1 : shape[-1] + 1]
    if layout == "transposed":
        return make.randn(shape[-1], *shape[:-1], scale=scale).movedim(0, -1)
    return make.randn(*shape, scale=scale)


def _weight(make: Maker, rows: int, cols: int, layout: str) -> Tensor:
    """(rows, cols), of a size that keeps the pre-activation near 1; "transposed": as GPT-2's Conv1D stores it."""
    if layout == "transposed":
        return make.randn(cols, rows, scale=cols**-0.5).T
    return make.randn(rows, cols, scale=cols**-0.5)


def _linear_act(
    name: str,
    shape: tuple[int, ...],
    hidden: int,
    activation: str = "gelu_tanh",
    bias: bool = True,
    layout: str = "",
    scale: float = 1.0,
    bench: bool = False,
) -> Case:
    def build(make: Maker) -> dict:
        rows = 2 * hidden if activation in GATED else hidden
        arguments = {
            "x": _inputs(make, shape, layout, scale),
            "weight": _weight(make, rows, shape[-1], layout),
            "activation": activation,
        }
        if bias:
            arguments["bias"] = make.randn(rows, scale=0.2)
        return arguments

    traits = frozenset({"scale"} if scale != 1.0 else ())
    return Case("linear_act", name, build, eager_linear_act, bench, traits)


def _mlp(
    name: str,
    shape: tuple[int, ...],
    hidden: int,
    out: int | None = None,
    activation: str = "gelu_tanh",
    bias: bool = True,
    layout: str = "",
    scale: float = 1.0,
    bench: bool = False,
) -> Case:
    def build(make: Maker) -> dict:
        rows = 2 * hidden if activation in GATED else hidden
        width = shape[-1] if out is None else out
        return {
            "x": _inputs(make, shape, layout, scale),
            "fc_weight": _weight(make, rows, shape[-1], layout),
            "fc_bias": make.randn(rows, scale=0.2) if bias else None,
            "proj_weight": _weight(make, width, hidden, layout),
            "proj_bias": make.randn(width, scale=0.2) if bias else None,
            "activation": activation,
        }

    return Case("mlp", name, build, eager_mlp, bench, frozenset({"scale"} if scale != 1.0 else ()))


CASES = [
    *(_linear_act(activation, (3, 7, 40), 72, activation) for activation in ACTIVATIONS),
    *(_linear_act(f"{a}-no-bias-odd", (5, 13), 35, a, bias=False) for a in ("gelu_tanh", "silu", "geglu")),
    _linear_act("one-row", (48,), 33, "swiglu"),
    _linear_act("many-rows", (261, 24), 50),
    _linear_act("hidden-1", (9, 16), 1, "geglu"),
    _linear_act("empty-batch", (2, 0, 32), 64, "swiglu"),
    _linear_act("sliced", (6, 40), 64, "silu", layout="sliced"),
    _linear_act("transposed", (3, 5, 40), 64, "swiglu", layout="transposed"),
    _linear_act("large", (7, 40), 64, "gelu_tanh", scale=30.0),
    _linear_act("tiny", (7, 40), 64, "gelu", scale=1e-3),
    *(_mlp(activation, (2, 6, 32), 96, activation=activation) for activation in ACTIVATIONS),
    *(_mlp(f"{a}-no-bias-odd", (5, 13), 35, 21, a, bias=False) for a in ("gelu_tanh", "relu2", "swiglu")),
    _mlp("gpt2", (33, 96), 384),
    _mlp("many-rows", (259, 24), 56, activation="geglu"),
    _mlp("one-row", (64,), 128),
    _mlp("empty-batch", (0, 32), 64),
    _mlp("sliced", (6, 40), 64, layout="sliced"),
    _mlp("transposed", (3, 5, 40), 64, activation="swiglu", layout="transposed"),
    _mlp("large", (7, 40), 64, activation="geglu", scale=30.0),
    _linear_act("1024x768-3072", (1024, 768), 3072, bench=True),
    _mlp("1024x768-3072-768", (1024, 768), 3072, bench=True),
    _mlp("1024x768-2048-768-swiglu", (1024, 768), 2048, activation="swiglu", bias=False, bench=True),
    _mlp("3072x384-1536-384", (3072, 384), 1536, bench=True),
]
