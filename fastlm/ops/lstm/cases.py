"""Cases of lstm, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.case import Case, Maker


def eager_lstm(gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over the steps, as a textbook writes it."""
    h, c, states = h0, c0, []
    for x in gates.unbind(1):
        i, f, g, o = (x + h @ weight.T).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    return torch.stack(states, 1), c


def _case(
    name: str, batch: int, steps: int, hidden: int, bench: bool = False, scale: float = 1.0, layout: str = ""
) -> Case:
    def build(make: Maker) -> dict:
        gates = make.randn(batch, steps, 4 * hidden, scale=scale)
        if layout == "steps first":
            gates = make.randn(steps, batch, 4 * hidden).transpose(0, 1)
        elif layout == "sliced":
            gates = make.randn(batch, steps, 4 * hidden + 3)[..., 1:-2]
        return {
            "gates": gates,
            "h0": make.randn(batch, hidden, scale=0.5),
            "c0": make.randn(batch, hidden),
            # not scaled with the gates: the recurrence would be chaotic, and every rounding grow from step to step
            "weight": make.randn(4 * hidden, hidden, scale=hidden**-0.5),
        }

    return Case("lstm", name, build, eager_lstm, bench, frozenset({"scale"} if scale > 1 else ()))


CASES = [
    _case("plain", 3, 5, 16),
    _case("one-step", 4, 1, 24),
    _case("one-row", 1, 6, 20),
    _case("odd", 7, 3, 13),
    _case("width-1", 2, 4, 1),
    _case("width-33", 5, 4, 33),
    _case("wide", 13, 3, 80),
    _case("long", 2, 40, 32),
    _case("empty-batch", 0, 3, 8),
    _case("large", 3, 4, 16, scale=20.0),
    _case("steps-first", 3, 4, 16, layout="steps first"),
    _case("sliced", 3, 4, 16, layout="sliced"),
    _case("32x64x256", 32, 64, 256, bench=True),
    _case("32x64x512", 32, 64, 512, bench=True),
]
