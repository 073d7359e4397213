"""The one suite of the ops: op x backend x case x dtype, forward and backward.

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
from fastlm.ops.case import Case, Maker, all_cases

BACKENDS = registry.NAMES
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = all_cases()


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def outputs_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def differentiable(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


def run(function: Any, arguments: dict[str, Any], upstream: list[Tensor] | None = None) -> tuple[list, list, list]:
    """Forward and backward: (outputs, gradients of the inputs, the upstream gradients used)."""
    leaves = {k: v.detach().requires_grad_() for k, v in differentiable(arguments).items()}
    outputs = outputs_of(function(**{**arguments, **leaves}))
    smooth = [o for o in outputs if o.requires_grad]
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in smooth]
    gradients = torch.autograd.grad(
        smooth, list(leaves.values()), [g.to(o.dtype) for g, o in zip(upstream, smooth, strict=True)], allow_unused=True
    )
    return [o.detach() for o in outputs], list(gradients), upstream


def check(name: str, got: Tensor | None, wanted: Tensor | None, textbook: Tensor | None, dtype: torch.dtype) -> None:
    """The rule: rms and largest error at most twice textbook PyTorch's, plus a few units in the last place."""
    if wanted is None or textbook is None:
        assert got is None or not got.any(), f"{name}: a gradient where there is none"
        return
    assert got is not None, f"{name}: no gradient"
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    assert got.dtype == textbook.dtype, f"{name}: dtype {got.dtype}, wanted {textbook.dtype}"
    if wanted.numel() == 0:
        return
    error, allowed = (got.double() - wanted).abs(), (textbook.double() - wanted).abs()
    unit = torch.finfo(dtype).eps * wanted.abs().max().item()
    floor = (4 if dtype == torch.float32 else 0.5) * unit + torch.finfo(dtype).tiny
    rms, rms_allowed = error.square().mean().sqrt().item(), allowed.square().mean().sqrt().item()
    assert rms <= 2 * rms_allowed + floor / 2, f"{name}: rms error {rms:.3g}, textbook PyTorch's is {rms_allowed:.3g}"
    largest, largest_allowed = error.max().item(), allowed.max().item()
    assert largest <= 2 * largest_allowed + floor, f"{name}: error {largest:.3g}, textbook's is {largest_allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str, case: Case, dtype: torch.dtype) -> None:
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
    for i, (got, want, text) in enumerate(zip(outputs, wanted, textbook, strict=True)):
        check(f"output {i}", got, want, text, dtype)
    names = differentiable(arguments)
    for name, got, want, text in zip(names, gradients, wanted_gradients, textbook_gradients, strict=True):
        check(f"d{name}", got, want, text, dtype)
    for first, second in zip([*outputs, *gradients], [*again, *gradients_again], strict=True):
        same = first is None and second is None or torch.equal(first, second)
        assert same, "two runs differ"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_gradients_are_those_of_its_forward(case: Case) -> None:
    """gradcheck in float64: numerical differentiation of the forward against the spelled-out backward."""
    arguments = case.build(Maker(torch.float64, seed=2))
    if "scale" in case.traits:
        pytest.skip("the step of numerical differentiation does not suit this scale")
    names = list(differentiable(arguments))
    op = getattr(ops, case.op)

    def function(*tensors: Tensor) -> Any:
        return op(**{**arguments, **dict(zip(names, tensors, strict=True))})

    inputs = [arguments[n].detach().requires_grad_() for n in names]
    with fastlm.backend("reference"):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_without_gradients_is_the_same(case: Case) -> None:
    arguments = case.build(Maker(torch.float32))
    op = getattr(ops, case.op)
    outputs, _, _ = run(op, arguments)
    with torch.no_grad():
        plain = outputs_of(op(**arguments))
    for a, b in zip(outputs, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_are_left_alone(case: Case) -> None:
    arguments = case.build(Maker(torch.float32))
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    run(getattr(ops, case.op), arguments)
    for name, value in before.items():
        assert torch.equal(arguments[name], value), f"{name} was changed"


@pytest.mark.parametrize("case", [next(c for c in CASES if c.op == op) for op in dict.fromkeys(c.op for c in CASES)], ids=str)
def test_explain_names_the_backend_that_runs(case: Case) -> None:
    arguments = case.build(Maker(torch.float32))
    explanation = ops.explain(case.op, **arguments)
    assert explanation.chosen is not None and explanation.reasons[explanation.chosen] is None
    assert set(explanation.reasons) == set(registry.NAMES)
    text = str(explanation)
    assert all(name in text for name in registry.NAMES) and "runs this call" in text
    with fastlm.backend("cuda"):
        if not torch.cuda.is_available():
            with pytest.raises(fastlm.UnsupportedError, match="cuda"):
                getattr(ops, case.op)(**arguments)
