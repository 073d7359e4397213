"""In plain eager mode a raw op is a function call; whoever looks at calls from outside sees it in the dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import ops

X, W = torch.randn(4, 8), torch.ones(8)
NAME = "fastlm::layer_norm_forward"


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
    got = torch.func.vmap(lambda x: ops.layer_norm(x, W))(X)
    torch.testing.assert_close(got, ops.layer_norm(X, W))
