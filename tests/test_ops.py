"""The one suite of the ops: op x backend x case x dtype, forward and backward. op_suite.py judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops import registry
from fastlm.ops.case import Case, Maker, all_cases
from fastlm.ops.triton_support import INTERPRETED
from tests.op_suite import BACKENDS, DTYPES, check_case, differentiable, first_cases, outputs_of, run

CASES = all_cases()
SLOW_IN_THE_INTERPRETER = {"attention", "attention_qkvpacked"}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str, case: Case, dtype: torch.dtype) -> None:
    turn = DTYPES[CASES.index(case) % len(DTYPES)]
    if backend == "triton" and INTERPRETED and case.op in SLOW_IN_THE_INTERPRETER and dtype != turn:
        pytest.skip("Triton's interpreter is slow: the cases take turns with the dtypes")
    check_case(backend, case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_gradients_are_those_of_its_forward(case: Case) -> None:
    """gradcheck in float64: numerical differentiation of the forward against the spelled-out backward."""
    arguments = case.build(Maker(torch.float64, seed=2))
    if "scale" in case.traits:
        pytest.skip("the step of numerical differentiation does not suit this scale")
    if "infinite" in case.traits:
        pytest.skip("an output is infinite: no difference quotient")
    if "padding" in case.traits:
        pytest.skip("by contract a padding row gets no gradient")
    names = list(differentiable(arguments))
    op = getattr(ops, case.op)

    def function(*tensors: Tensor) -> Any:
        torch.manual_seed(0)  # the same dropout mask at each call
        return op(**{**arguments, **dict(zip(names, tensors, strict=True))})

    inputs = [arguments[n].detach().requires_grad_() for n in names]
    with fastlm.backend("reference"):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_without_gradients_is_the_same(case: Case) -> None:
    arguments = case.build(Maker(torch.float32))
    op = getattr(ops, case.op)
    outputs, _, _ = run(op, arguments)
    torch.manual_seed(0)
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


@pytest.mark.parametrize("case", first_cases(), ids=str)
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
