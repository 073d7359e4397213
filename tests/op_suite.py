"""How an op is run and judged; the suite in test_ops.py and the tests of single ops share it.

The oracle is the reference backend in float64, on the very inputs that the kernel gets. A result is right when its
error against the oracle is at most twice that of textbook PyTorch in the same dtype, plus a few units in the last
place of its largest element.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops import registry
from fastlm.ops.case import Case, Maker, all_cases, differentiable

BACKENDS = registry.NAMES
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def first_cases() -> list[Case]:
    """One case of each op."""
    return list({case.op: case for case in reversed(all_cases())}.values())[::-1]


def outputs_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


def run(function: Any, arguments: dict[str, Any], upstream: list[Tensor] | None = None) -> tuple[list, list, list]:
    """Forward and backward: (outputs, gradients of the inputs, the upstream gradients used). Dropout repeats."""
    torch.manual_seed(0)
    leaves = {k: v.detach().requires_grad_() for k, v in differentiable(arguments).items()}
    outputs = outputs_of(function(**{**arguments, **leaves}))
    smooth = [o for o in outputs if o.requires_grad]
    if function in vars(ops).values():  # a view that an autograd.Function has made could not be written to in place
        assert not any(o._is_view() for o in smooth)
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in smooth]
    gradients = torch.autograd.grad(
        smooth, list(leaves.values()), [g.to(o.dtype) for g, o in zip(upstream, smooth, strict=True)], allow_unused=True
    )
    return [o.detach() for o in outputs], list(gradients), upstream


def check(
    name: str,
    got: Tensor | None,
    wanted: Tensor | None,
    textbook: Tensor | None,
    dtype: torch.dtype,
    units: float | None = None,
) -> None:
    """The rule: rms and largest error at most twice textbook PyTorch's, plus a few units in the last place.

    units: so many; default: 4 of float32, half a one of the other dtypes.
    """
    if wanted is None or textbook is None:
        assert got is None or not got.any(), f"{name}: a gradient where there is none"
        return
    assert got is not None, f"{name}: no gradient"
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    assert got.dtype == textbook.dtype, f"{name}: dtype {got.dtype}, wanted {textbook.dtype}"
    if wanted.numel() == 0:
        return
    finite = wanted.isfinite()
    if not finite.all():  # such as the -inf of an empty sum: exactly
        assert torch.equal(got.double()[~finite], wanted[~finite]), f"{name}: infinities in other places"
        got, wanted, textbook = got[finite], wanted[finite], textbook[finite]
        if wanted.numel() == 0:
            return
    error, allowed = (got.double() - wanted).abs(), (textbook.double() - wanted).abs()
    unit = torch.finfo(dtype).eps * wanted.abs().max().item()
    units = (4 if dtype == torch.float32 else 0.5) if units is None else units
    floor = units * unit + torch.finfo(dtype).tiny
    rms, rms_allowed = error.square().mean().sqrt().item(), allowed.square().mean().sqrt().item()
    assert rms <= 2 * rms_allowed + floor / 2, f"{name}: rms error {rms:.3g}, textbook PyTorch's is {rms_allowed:.3g}"
    largest, largest_allowed = error.max().item(), allowed.max().item()
    assert largest <= 2 * largest_allowed + floor, f"{name}: error {largest:.3g}, textbook's is {largest_allowed:.3g}"


def check_case(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Forward, backward and their repetition, against float64. Skips with the reason where the backend refuses."""
    if backend == "triton" and "large" in case.traits and not torch.cuda.is_available():
        pytest.skip("minutes in Triton's interpreter, which runs a program after the other in Python")
    arguments = case.build(Maker(dtype, device_of(backend)))
    op = getattr(ops, case.op)
    with fastlm.backend(backend):
        try:
            outputs, gradients, upstream = run(op, arguments)
        except fastlm.UnsupportedError as reason:
            pytest.skip(str(reason))
        again, gradients_again, _ = run(op, arguments, upstream)
    with fastlm.backend("reference"):
        wanted, wanted_gradients, _ = run(op, wide(arguments), upstream)
    textbook, textbook_gradients, _ = run(case.eager, arguments, upstream)
    # On a GPU Triton's products of float32 are three of TF32, whose operands it cuts off instead of rounding them.
    units = 24 if backend == "triton" and dtype == torch.float32 and torch.cuda.is_available() else None
    for i, (got, want, text) in enumerate(zip(outputs, wanted, textbook, strict=True)):
        check(f"output {i}", got, want, text, dtype, units)
    names = differentiable(arguments)
    for name, got, want, text in zip(names, gradients, wanted_gradients, textbook_gradients, strict=True):
        check(f"d{name}", got, want, text, dtype, units)
    for first, second in zip([*outputs, *gradients], [*again, *gradients_again], strict=True):
        same = (first is None and second is None) or torch.equal(first, second)
        assert same, "two runs differ"
