"""In plain eager mode a raw op is a function call; whoever looks at calls from outside sees it in the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import ops
from fastlm.ops.case import NO_GRADIENT, Case, Maker, all_cases

X, W = torch.randn(4, 8), torch.ones(8)
NAME = "fastlm::layer_norm_forward"


def _first_cases() -> list[Case]:
    cases = {case.op: case for case in reversed(all_cases()) if "in-place" not in case.traits}
    return list(cases.values())


def _function_of_floats(case: Case) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    """The sum of the results as a function of the floating-point arguments, and these."""
    arguments = case.build(Maker())
    floats = {name: t for name, t in arguments.items() if isinstance(t, Tensor) and t.is_floating_point()}

    def function(given: dict[str, Tensor]) -> Tensor:
        results: Any = getattr(ops, case.op)(**{**arguments, **given})
        return sum(t.sum() for t in (results if isinstance(results, tuple) else (results,)))

    return function, floats


def test_a_profiler_sees_the_ops() -> None:
    x = X.clone().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.layer_norm(x, W).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {NAME, "fastlm::layer_norm_backward"} <= names


def test_a_dispatch_mode_sees_the_ops() -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Mode():
        ops.layer_norm(X, W)
    assert NAME in seen


def test_a_tensor_subclass_sees_the_ops() -> None:
    seen = []

    class Logged(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return torch.zeros(()), None, None

    for x, weight in ((X.as_subclass(Logged), W), (X, W.as_subclass(Logged))):
        seen.clear()
        assert ops.layer_norm(x, weight).shape == ()
        assert NAME in seen


def test_vmap_goes_through_the_dispatcher() -> None:
    norm = torch.nn.functional.layer_norm
    for x in (X, X.unsqueeze(1)):
        got = torch.func.vmap(lambda x: ops.layer_norm(x, W))(x)
        torch.testing.assert_close(got, norm(x, (8,), W))
    got = torch.func.vmap(lambda x: x + ops.layer_norm(X, W))(X)  # of a tensor that vmap has not wrapped
    torch.testing.assert_close(got, X[:, None] + norm(X, (8,), W))


@pytest.mark.parametrize("case", _first_cases(), ids=str)
def test_functorchs_gradient_is_refused_and_never_zero(case: Case) -> None:
    function, floats = _function_of_floats(case)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(function)({name: t for name, t in floats.items() if name not in NO_GRADIENT})


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", _first_cases(), ids=str)
def test_a_tangent_is_refused_and_never_dropped(case: Case, autocast: bool, recorded: bool) -> None:
    function, floats = _function_of_floats(case)
    floats = {name: t.requires_grad_(recorded and name not in NO_GRADIENT) for name, t in floats.items()}
    tangents = {name: torch.ones_like(t) for name, t in floats.items()}
    with torch.autocast("cpu", enabled=autocast):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"jvp"):
            function({name: forward_ad.make_dual(t, tangents[name]) for name, t in floats.items()})
        function(floats)  # outside of it nothing is refused
        if not recorded:
            with pytest.raises(NotImplementedError, match=r"jvp"):
                torch.func.jvp(function, (floats,), (tangents,))
