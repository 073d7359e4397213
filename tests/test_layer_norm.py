"""What is particular to layer_norm and rms_norm: bad input, special values, use of the outputs, fuzz."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm
from fastlm.ops import layer_norm, rms_norm
from fastlm.ops.case import Case, Maker
from fastlm.ops.layer_norm.cases import _build, eager_layer_norm, eager_rms_norm
from tests.op_suite import BACKENDS, check_case

X, W = torch.randn(3, 8), torch.randn(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.tensor(1.0)}, "at least one dimension, got a scalar"),
        ({"x": torch.randn(3, 0)}, r"must not be empty, got shape \(3, 0\)"),
        ({"weight": torch.randn(9)}, r"weight must have shape \(C\) = \(8,\), got \(9,\)"),
        ({"bias": torch.randn(2, 8)}, r"bias must have shape \(C\) = \(8,\), got \(2, 8\)"),
        ({"bias": W.half()}, "bias is torch.float16, but weight is torch.float32"),
        ({"x": X.int()}, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
        ({"weight": W.to("meta")}, "weight is on meta, but x is on cpu"),
        ({"residual": torch.randn(2, 8)}, r"residual must have shape of x = \(3, 8\), got \(2, 8\)"),
        ({"residual": X.half()}, "residual is torch.float16, which cannot hold x's torch.float32"),
        ({"eps": -1.0}, "eps must not be negative, got -1.0"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_norm(**{"x": X, "weight": W, **arguments})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_stays_in_its_row(backend: str, norm, value: float) -> None:
    x = torch.randn(4, 33)
    x[1, 5] = value
    with fastlm.backend(backend):
        try:
            y = norm(x, torch.ones(33))
        except fastlm.UnsupportedError as reason:
            pytest.skip(str(reason))
    assert y[1].isnan().any()
    assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_of_the_outputs_is_used(backend: str) -> None:
    """Gradients are right when only y, only h, or both reach the loss."""
    with fastlm.backend(backend):
        for pick in ([0], [1], [0, 1]):
            x, r, w = (t.clone().requires_grad_() for t in (X, torch.randn(3, 8), W))
            x2, r2, w2 = (t.detach().clone().requires_grad_() for t in (x, r, w))
            try:
                got = layer_norm(x, w, residual=r)
            except fastlm.UnsupportedError as reason:
                pytest.skip(str(reason))
            wanted = eager_layer_norm(x2, w2, residual=r2)
            sum(got[i].square().sum() for i in pick).backward()
            sum(wanted[i].square().sum() for i in pick).backward()
            torch.testing.assert_close(x.grad, x2.grad)
            torch.testing.assert_close(r.grad, r2.grad)
            torch.testing.assert_close(w.grad, w2.grad if w2.grad is not None else None)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 6), max_size=2).flatmap(
        # below a width of 16 the terms of dx cancel, and a bound relative to dx itself says nothing
        lambda lead: st.integers(16, 300).map(lambda width: (*lead, width))
    ),
    bias=st.booleans(),
    residual=st.booleans(),
    wide_residual=st.booleans(),
    wide_weight=st.booleans(),
    layout=st.sampled_from(["", "sliced", "transposed"]),
    rms=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_fuzz(backend, shape, bias, residual, wide_residual, wide_weight, layout, rms, dtype) -> None:
    build = _build(shape, bias and not rms, residual, wide_residual, wide_weight, layout=layout)
    op, eager = ("rms_norm", eager_rms_norm) if rms else ("layer_norm", eager_layer_norm)
    check_case(backend, Case(op, "fuzz", build, eager), dtype)


def test_memory_of_the_caller_is_not_kept_by_the_statistics() -> None:
    """The backward pass keeps h, the weight and two numbers a row: nothing of the size of x beside h."""
    saved: list[torch.Tensor] = []
    x, r, w = torch.randn(16, 256, requires_grad=True), torch.randn(16, 256), torch.ones(256)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, h = layer_norm(x, w, residual=r)
    assert sum(t.numel() for t in saved) <= h.numel() + w.numel() + 2 * 16


def test_maker_is_the_same_for_every_dtype() -> None:
    assert torch.equal(Maker(torch.float32).randn(4).bfloat16(), Maker(torch.bfloat16).randn(4))
