"""mlp and linear_act beyond the op suite: formulas, gradients on demand, memory, compile, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.ops import linear, linear_act, mlp, products
from fastlm.ops.mlp import reference
from fastlm.ops.mlp.reference import ACTIVATIONS, GATED

FORMULAS = {
    "gelu_tanh": lambda h: 0.5 * h * (1 + math.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "gelu": lambda h: 0.5 * h * (1 + math.erf(h / math.sqrt(2))),
    "relu": lambda h: max(h, 0.0),
    "relu2": lambda h: max(h, 0.0) ** 2,
    "silu": lambda h: h / (1 + math.exp(-h)),
    "swiglu": lambda h: h / (1 + math.exp(-h)),
    "geglu": lambda h: 0.5 * h * (1 + math.erf(h / math.sqrt(2))),
}


def inputs(activation: str, dtype: torch.dtype = torch.float32, rows: int = 6) -> list[Tensor]:
    """x (rows, 8), fc_weight (12 or 24, 8), fc_bias, proj_weight (5, 12), proj_bias."""
    generator = torch.Generator().manual_seed(3)
    hidden = 24 if activation in GATED else 12
    shapes = [(rows, 8), (hidden, 8), (hidden,), (5, 12), (5,)]
    return [torch.randn(shape, generator=generator).to(dtype) * 0.5 for shape in shapes]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_its_formula(activation: str) -> None:
    points = torch.tensor([-20.0, -3.0, -1.0, -0.1, 0.0, 1e-4, 0.5, 2.0, 9.0], dtype=torch.float64)
    weight = torch.ones(1, 1, dtype=torch.float64)
    up = 1.0
    if activation in GATED:  # the gate's row first, then the row that it multiplies
        weight, up = torch.tensor([[1.0], [3.0]], dtype=torch.float64), 3.0
    y = linear_act(points[:, None], weight, activation=activation)
    for h, got in zip(points.tolist(), y[:, 0].tolist(), strict=True):
        wanted = FORMULAS[activation](h) * (up * h if activation in GATED else 1.0)
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_geglu_uses_erf_not_tanh() -> None:
    x, weight = torch.full((1, 1), 1.5, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    y = linear_act(x, weight, activation="geglu").item()
    assert y == pytest.approx(1.5 * FORMULAS["gelu"](1.5), rel=1e-12)
    assert abs(y - 1.5 * FORMULAS["gelu_tanh"](1.5)) > 1e-5


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_mlp_is_its_two_halves(activation: str) -> None:
    x, fc_weight, fc_bias, proj_weight, proj_bias = inputs(activation)
    half = linear_act(x, fc_weight, fc_bias, activation=activation)
    whole = mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, activation=activation)
    torch.testing.assert_close(whole, torch.nn.functional.linear(half, proj_weight, proj_bias))


@pytest.mark.parametrize("asked", [[0], [1], [2], [3], [4], [0, 3], [1, 4], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_only_the_gradients_asked_for(activation: str, asked: list[int]) -> None:
    every = [t.requires_grad_() for t in inputs(activation)]
    upstream = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
    wanted = torch.autograd.grad(mlp(*every, activation=activation), every, upstream)
    some = [t.detach().requires_grad_(i in asked) for i, t in enumerate(every)]
    mlp(*some, activation=activation).backward(upstream)
    for i, t in enumerate(some):
        assert (t.grad is not None) == (i in asked)
        if t.grad is not None:
            assert torch.equal(t.grad, wanted[i])


def test_frozen_weights_save_matrix_products() -> None:
    """With only x asked for, the backward pass makes two products (dhidden, dx), not four."""
    from torch.utils.flop_counter import FlopCounterMode

    x, fc_weight, _, proj_weight, _ = inputs("gelu_tanh")
    needs = [True, False, False, False, False]
    with FlopCounterMode(display=False) as counter:
        pre, options = torch.ones(6, 12), ("gelu_tanh", needs, torch.float32)
        reference.mlp_backward(torch.ones(6, 5), x, fc_weight, proj_weight, pre, *options)
    assert counter.get_total_flops() == 2 * 6 * 12 * (5 + 8)


class _Saved:
    """The tensors that a forward pass keeps for its backward pass, without the leaves."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def pack(self, t: Tensor) -> Tensor:
        if not any(t is s for s in self.tensors):
            self.tensors.append(t)
        return t

    def numel(self, without: list[Tensor]) -> int:
        return sum(t.numel() for t in self.tensors if not any(t.data_ptr() == w.data_ptr() for w in without))


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_only_the_pre_activation_is_kept(activation: str) -> None:
    leaves = [t.requires_grad_() for t in inputs(activation)]
    saved = _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        mlp(*leaves, activation=activation)
    assert saved.numel(leaves) == 6 * (24 if activation in GATED else 12)


@pytest.mark.parametrize("activation", ["gelu_tanh", "geglu"])
def test_autocast(activation: str) -> None:
    leaves = [t.requires_grad_() for t in inputs(activation)]
    upstream = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mlp(*leaves, activation=activation)
        half = linear_act(*leaves[:3], activation=activation)
    assert y.dtype == half.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, leaves, upstream.bfloat16())
    low = [t.detach().bfloat16().requires_grad_() for t in leaves]
    plain = mlp(*low, activation=activation)
    assert torch.equal(y, plain)
    for got, rounded in zip(gradients, torch.autograd.grad(plain, low, upstream.bfloat16()), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got.bfloat16(), rounded)


@pytest.mark.skipif(not products.widens(torch.bfloat16), reason="here bfloat16's products are the library's")
def test_autocast_rounds_no_gradient() -> None:
    """The gradients of float32 weights and biases are sums in float32 of bfloat16's exact products."""
    make = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(32, n, generator=make).bfloat16() for n in (16, 24))
    weight, bias = (
        torch.randn(24, 16, generator=make).requires_grad_(),
        torch.randn(24, generator=make).requires_grad_(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = linear(x, weight, bias), mlp(x, torch.eye(16), None, weight, bias, activation="relu")
    for y, seen in zip(results, (x, x.relu()), strict=True):
        dweight, dbias = torch.autograd.grad(y, (weight, bias), dy)
        torch.testing.assert_close(dweight.double(), dy.double().T @ seen.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dbias.double(), dy.double().sum(0), rtol=1e-5, atol=1e-5)


def test_autocast_leaves_float64_alone() -> None:
    leaves = inputs("silu", torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mlp(*leaves, activation="silu")
    assert y.dtype == torch.float64
    assert torch.equal(y, mlp(*leaves, activation="silu"))


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(activation: str, bias: bool) -> None:
    x, fc_weight, fc_bias, proj_weight, proj_bias = inputs(activation)
    if not bias:
        fc_bias = proj_bias = None
    backend = fastlm.ops.explain("mlp", x, fc_weight, fc_bias, proj_weight, proj_bias, activation=activation).chosen
    ops = torch.ops.fastlm
    for keep in (True, False):
        torch.library.opcheck(ops.linear_act_forward, (x, fc_weight, fc_bias, activation, keep, backend))
        torch.library.opcheck(
            ops.mlp_forward, (x, fc_weight, fc_bias, proj_weight, proj_bias, activation, keep, backend)
        )
    hidden, pre = ops.linear_act_forward(x, fc_weight, fc_bias, activation, True, backend)
    dy = torch.randn(6, 5)
    for needs in ([True] * 5, [True, False, True, False, False], [False, False, False, True, True]):
        options = torch.float32, backend
        torch.library.opcheck(ops.linear_act_backward, (hidden, x, fc_weight, pre, activation, needs[:3], *options))
        torch.library.opcheck(ops.mlp_backward, (dy, x, fc_weight, proj_weight, pre, activation, needs, *options))


def test_compile_fullgraph() -> None:
    leaves = [t.requires_grad_() for t in inputs("gelu_tanh")]
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    y = compiled(*leaves)
    assert torch.equal(y, mlp(*leaves))
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(mlp(*leaves).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [float("nan"), 1e18, -1e18])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_at_the_edge(activation: str, value: float) -> None:
    """NaN goes through, huge values do not turn into NaN, and one row does not touch another."""
    x = torch.tensor([[value], [0.5]])
    weight = torch.ones(2 if activation in GATED else 1, 1)
    y = linear_act(x, weight, activation=activation)
    squared = activation in GATED or activation == "relu2"
    wanted = value if value != value else max(value, 0.0) ** (2 if squared else 1)
    alone = linear_act(x[1:], weight, activation=activation)
    torch.testing.assert_close(y, torch.tensor([[wanted], [alone.item()]]), equal_nan=True)


def test_double_backward_is_refused() -> None:
    leaves = [t.requires_grad_() for t in inputs("gelu_tanh")]
    (gradient,) = torch.autograd.grad(mlp(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_bad_input() -> None:
    x, fc_weight, fc_bias, proj_weight, proj_bias = inputs("gelu_tanh")
    with pytest.raises(ValueError, match=r"no activation 'gelu_tan' \(did you mean 'gelu_tanh'\?\)"):
        mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, activation="gelu_tan")
    with pytest.raises(ValueError, match=r"fc_weight must have shape \(F, C\), C = 8 .* got \(8, 12\)"):
        mlp(x, fc_weight.T, fc_bias, proj_weight, proj_bias)
    with pytest.raises(ValueError, match=r"fc_bias must have shape \(F\) = \(12,\), got \(5,\)"):
        mlp(x, fc_weight, proj_bias, proj_weight, proj_bias)
    with pytest.raises(ValueError, match=r"proj_weight must have shape \(C_out, F\), F = 12 .* got \(12, 5\)"):
        mlp(x, fc_weight, fc_bias, proj_weight.T, proj_bias)
    with pytest.raises(ValueError, match=r"F = 6 as half the 12 rows of fc_weight"):
        mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, activation="swiglu")
    with pytest.raises(ValueError, match=r"proj_bias must have shape \(C_out\) = \(5,\), got \(12,\)"):
        mlp(x, fc_weight, fc_bias, proj_weight, fc_bias)
    with pytest.raises(ValueError, match=r"fc_weight is torch.bfloat16, but x is torch.float32"):
        mlp(x, fc_weight.bfloat16(), fc_bias, proj_weight, proj_bias)
    with pytest.raises(ValueError, match=r"weight of a gated activation must have an even number of rows, got 11"):
        linear_act(x, fc_weight[:11], activation="swiglu")
    with pytest.raises(ValueError, match=r"x must be float32, bfloat16, float16 or float64, got torch.int64"):
        linear_act(x.long(), fc_weight, activation="relu")
    with pytest.raises(ValueError, match=r"x must have at least one dimension"):
        linear_act(x[0, 0], fc_weight, activation="relu")
    with pytest.raises(ValueError, match=r"weight must not be empty, got shape \(0, 8\)"):
        linear_act(x, fc_weight[:0], activation="relu")
    with pytest.raises(ValueError, match=r"proj_weight must not be empty, got shape \(0, 12\)"):
        mlp(x, fc_weight, fc_bias, proj_weight[:0], None)
    with pytest.raises(ValueError, match=r"weight is on meta, but x is on cpu"):
        linear_act(x, fc_weight.to("meta"), activation="relu")
