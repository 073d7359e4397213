"""csrc/common/simd_math.h keeps its error bounds over all of float32, on each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastlm.ops import native

if native.cpu_unavailable() is not None:
    pytest.skip(str(native.cpu_unavailable()), allow_module_level=True)

FUNCTIONS = ["exp", "logistic", "tanh", "normal_cdf", "normal_density"]  # the codes of csrc/common/vector_math.h


def computed(function: str, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    native.C.vector_math(FUNCTIONS.index(function), x.data_ptr(), out.data_ptr(), x.numel())
    return out.double()


def every(step: int = 997) -> Tensor:
    """Every `step`-th float32 from 0 to the largest, both signs, and an odd number of them."""
    bits = torch.arange(0, 0x7F800000, step, dtype=torch.int32)
    bits = bits[: bits.numel() - 1 + bits.numel() % 2]
    positive = bits.view(torch.float32)
    return torch.cat([positive, -positive[1:]])


def ulps(got: Tensor, wanted: Tensor) -> Tensor:
    """The errors in units in the last place of float32; 0 where both overflow."""
    exponent = torch.frexp(wanted.abs().clamp(min=2.0**-126))[1] - 1
    error = (got - wanted).abs() / torch.ldexp(torch.ones((), dtype=torch.float64), exponent - 23)
    return error.masked_fill(wanted.float().double() == got, 0)


def worst(function: str, wanted: Tensor, x: Tensor) -> float:
    error = ulps(computed(function, x), wanted)
    assert not error.isnan().any()
    return error.max().item()


def check_bounds() -> None:
    x = every()
    wide = x.double()
    assert worst("exp", wide.exp(), x) <= 1.0
    assert worst("tanh", wide.tanh(), x) <= 2.0
    inside = x >= -87
    assert worst("logistic", wide.sigmoid()[inside], x[inside].contiguous()) <= 3.0
    assert computed("logistic", x[~inside].contiguous()).max().item() < 2e-38
    exact, got = torch.special.ndtr(wide), computed("normal_cdf", x)
    assert (got - exact).abs().max().item() < 3e-7
    upper = x >= -5
    assert ((got - exact).abs() / exact)[upper].max().item() < 1e-6
    density = torch.exp(-wide * wide / 2) * 0.3989422804014327
    assert (computed("normal_density", x) - density).abs().max().item() < 1e-7


def check_edges() -> None:
    inf = float("inf")
    edges = torch.tensor([float("nan"), inf, -inf, 0.0, -0.0, 89.0, -104.0])
    assert computed("exp", edges)[0].isnan() and computed("exp", edges).tolist()[1:] == [inf, 0, 1, 1, inf, 0]
    tanh = computed("tanh", edges)
    assert tanh[0].isnan() and tanh.tolist()[1:] == [1, -1, 0, 0, 1, -1] and tanh[4].signbit()
    for function, low, high in (("logistic", 0, 1), ("normal_cdf", 0, 1), ("normal_density", 0, 0)):
        got = computed(function, edges)
        assert got[0].isnan() and got.tolist()[1:3] == [high, low]


@pytest.mark.parametrize("isa", native.C.cpu_isas())
def test_bounds(isa: str) -> None:
    """In a process of its own: an instruction set is chosen once a process."""
    command = [
        sys.executable,
        "-c",
        "import test_simd_math as t; t.check_bounds(); t.check_edges(); print(t.native.C.cpu_isa())",
    ]
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "FASTLM_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == isa, done.stderr
