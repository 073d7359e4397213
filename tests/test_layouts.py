"""Tensors as they come: anywhere in memory, with any strides, and with sizes of zero; on every backend at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops.case import Case, Maker
from tests.op_suite import BACKENDS, device_of, first_cases, run

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))


def shifted(t: Tensor) -> Tensor:
    """The same tensor, one element past an aligned address."""
    memory = t.new_empty(t.numel() + 1)
    memory[1:] = t.reshape(-1)
    return memory[1:].view(t.shape)


def spread(t: Tensor) -> Tensor:
    """The same tensor with something of no use between its elements: NaN, or what is out of any range."""
    between = torch.full_like(t, math.nan if t.is_floating_point() else 2**30)
    return torch.stack((t, between), -1)[..., 0]


def results(
    op: str, backend: str, arguments: dict[str, Any], upstream: list[Tensor] | None = None
) -> tuple[list, list]:
    """Outputs and gradients, and the upstream gradients used. Skips with the reason where the backend refuses."""
    with fastlm.backend(backend):
        try:
            outputs, gradients, upstream = run(getattr(ops, op), arguments, upstream)
        except fastlm.UnsupportedError as reason:
            pytest.skip(str(reason))
    return [*outputs, *gradients], upstream


def assert_close(got: list[Tensor | None], wanted: list[Tensor | None], dtype: torch.dtype) -> None:
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert (a is None) == (b is None), f"result {i}"
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("change", [shifted, spread], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])  # that one is plain PyTorch
@DTYPES
@pytest.mark.parametrize("case", first_cases(), ids=str)
def test_layout(case: Case, dtype: torch.dtype, backend: str, change: Callable[[Tensor], Tensor]) -> None:
    arguments = case.build(Maker(dtype, device_of(backend)))
    changed = {k: change(v) if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in arguments.items()}
    wanted, upstream = results(case.op, backend, arguments)
    got, _ = results(case.op, backend, changed, [change(g) if g.dim() > 0 else g for g in upstream])
    assert_close(got, wanted, dtype)


# What each op is given, from a Maker. No row, no token, no sequence, no column to attend to.
EMPTY: dict[str, tuple[str, Callable[[Maker], dict[str, Any]]]] = {
    "layer_norm": ("layer_norm", lambda m: {"x": m.randn(0, 64), "weight": m.randn(64), "bias": m.randn(64)}),
    "layer_norm with residual": (
        "layer_norm",
        lambda m: {"x": m.randn(2, 0, 64), "weight": m.randn(64), "residual": m.randn(2, 0, 64)},
    ),
    "rms_norm": ("rms_norm", lambda m: {"x": m.randn(0, 64), "weight": m.randn(64)}),
    "attention of no sequence": ("attention", lambda m: {n: m.randn(0, 5, 2, 16) for n in "qkv"}),
    "attention of no token": ("attention", lambda m: {n: m.randn(2, 0, 2, 16) for n in "qkv"}),
    "attention to nothing": (
        "attention",
        lambda m: {"q": m.randn(2, 3, 2, 16), "k": m.randn(2, 0, 2, 16), "v": m.randn(2, 0, 2, 16)},
    ),
    "linear": ("linear", lambda m: {"x": m.randn(0, 32), "weight": m.randn(48, 32), "bias": m.randn(48)}),
    "linear_act": ("linear_act", lambda m: {"x": m.randn(0, 32), "weight": m.randn(48, 32), "activation": "relu"}),
    "mlp": (
        "mlp",
        lambda m: {
            "x": m.randn(2, 0, 32),
            "fc_weight": m.randn(64, 32),
            "fc_bias": m.randn(64),
            "proj_weight": m.randn(32, 64),
            "proj_bias": m.randn(32),
        },
    ),
    "linear_cross_entropy": (
        "linear_cross_entropy",
        lambda m: {"x": m.randn(0, 32), "weight": m.randn(50, 32), "targets": m.integers(0, 50, 0), "reduction": "sum"},
    ),
    "mean of no loss": (
        "linear_cross_entropy",
        lambda m: {"x": m.randn(0, 32), "weight": m.randn(50, 32), "targets": m.integers(0, 50, 0)},
    ),
    "rotary": (
        "rotary",
        lambda m: {
            "q": m.randn(2, 0, 4, 16),
            "k": m.randn(2, 0, 2, 16),
            "cos": m.randn(0, 8, dtype=torch.float32),
            "sin": m.randn(0, 8, dtype=torch.float32),
        },
    ),
    "embedding": ("embedding", lambda m: {"ids": m.integers(0, 9, 2, 0), "weight": m.randn(9, 16)}),
    "lstm": (
        "lstm",
        lambda m: {
            "gates": m.randn(0, 3, 64),
            "h0": m.randn(0, 16),
            "c0": m.randn(0, 16),
            "weight": m.randn(64, 16),
        },
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@DTYPES
@pytest.mark.parametrize("name", EMPTY)
def test_sizes_of_zero(name: str, dtype: torch.dtype, backend: str) -> None:
    op, build = EMPTY[name]
    arguments = build(Maker(dtype, device_of(backend)))
    wanted, upstream = results(op, "reference", arguments)
    got, _ = results(op, backend, arguments, upstream)
    assert [None if t is None else (t.shape, t.dtype) for t in got] == [
        None if t is None else (t.shape, t.dtype) for t in wanted
    ]
    assert_close(got, wanted, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_sample_decode_or_update(backend: str) -> None:
    device = device_of(backend)
    try:
        with fastlm.backend(backend):
            assert ops.sample(torch.zeros(0, 9, device=device)).shape == (0,)
            caches = torch.zeros(2, 0, 7, 2, 16, device=device)
            lengths = torch.zeros(0, dtype=torch.int32, device=device)
            assert ops.decode_attention(torch.zeros(0, 1, 2, 16, device=device), *caches, lengths).shape == (
                0,
                1,
                2,
                16,
            )
            p = torch.nn.Parameter(torch.zeros(0, 4, device=device))
            p.grad = torch.zeros_like(p)
            norm, scale = fastlm.optim.clip_grad_norm([p], 1.0)
            fastlm.optim.AdamW([p]).step(grad_scale=scale)
            assert (norm.item(), scale.item()) == (0, 1)
    except fastlm.UnsupportedError as reason:
        pytest.skip(str(reason))
