"""Functions of fastlm._C that take torch's tensors (csrc/common/torch_tensor.h), and the way without them."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import fastlm
from fastlm import ops
from fastlm.ops import memory, native
from fastlm.ops.case import Case, Maker
from fastlm.ops.embedding.cases import CASES as EMBEDDING
from fastlm.ops.layer_norm.cases import CASES
from tests.op_suite import run

pytestmark = pytest.mark.skipif(native.cpu_unavailable() is not None, reason=str(native.cpu_unavailable()))
needs_api = pytest.mark.skipif(not native.reads_tensors(), reason="this torch does not export DLPack's exchange API")

X, W, B = torch.randn(4, 64), torch.randn(64), torch.randn(64)


def without_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "reads_tensors", lambda: False)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of the two functions whether it was taken."""
    seen: list[bool] = []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            function = getattr(native_C, name)
            return self._counted(function) if name.endswith("_torch") and name != "connect_torch" else function

        @staticmethod
        def _counted(function: Callable) -> Callable:
            def call(*arguments: Any) -> Any:
                result = function(*arguments)
                seen.append(result is not None)
                return result

            return call

    native_C = native.C
    monkeypatch.setattr(native, "C", Counted())
    return seen


@needs_api
@pytest.mark.parametrize("dtype", list(native.DTYPE_CODE))
@pytest.mark.parametrize("case", [case for case in (*CASES, *EMBEDDING) if not case.bench], ids=str)
def test_both_ways_give_the_same_bits(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.build(Maker(dtype))
    outputs, gradients, upstream = run(getattr(ops, case.op), arguments)
    without_api(monkeypatch)
    outputs_without, gradients_without, _ = run(getattr(ops, case.op), arguments, upstream)
    for one, other in zip([*outputs, *gradients], [*outputs_without, *gradients_without], strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)


@needs_api
@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("shape", [(64,), (4, 64), (2, 1, 3, 64), (1,) * 7 + (64,)])
@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.Tensor.detach])
def test_plain_tensors_and_parameters_are_taken(
    answers: list[bool], backend: str, shape: tuple, kind: Callable
) -> None:
    x, weight = kind(torch.randn(shape)), kind(W)
    with fastlm.backend(backend):
        y, _ = ops.layer_norm(x, weight, B, residual=torch.randn(shape))
        if y.requires_grad:
            torch.autograd.grad(y, (x, weight), torch.randn(shape))
        ops.rms_norm(x, weight)
    assert len(answers) == 2 + y.requires_grad and all(answers)


@needs_api
@pytest.mark.parametrize("x", [X.double(), X.t().contiguous().t(), torch.zeros(0, 64), torch.randn((1,) * 8 + (64,))])
def test_what_is_out_of_the_ordinary_is_refused(answers: list[bool], x: torch.Tensor) -> None:
    y = ops.layer_norm(x, W.to(x.dtype), residual=x)[0]
    assert answers == [False]
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(2 * x, (64,), W.to(x.dtype)))


@needs_api
def test_rows_that_are_expanded_or_far_apart(answers: list[bool]) -> None:
    for x in (X[:1].expand(5, 64), torch.randn(4, 100)[:, 3:67], torch.randn(3, 9, 64)[:, ::3]):
        torch.testing.assert_close(ops.layer_norm(x, W, B), torch.nn.functional.layer_norm(x, (64,), W, B))
    assert answers == [True] * 3


@needs_api
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (1,) * 7])
def test_ids_that_are_taken(answers: list[bool], shape: tuple, dtype: torch.dtype) -> None:
    ids, weight = torch.randint(4, shape).to(dtype), X.clone().requires_grad_()
    y = ops.embedding(ids, weight)
    assert answers == [True] and y.shape == (*shape, 64) and torch.equal(y, X[ids.long()])
    (dweight,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(
        dweight, torch.bincount(ids.long().flatten(), minlength=4)[:, None].expand(4, 64).float()
    )


@needs_api
@pytest.mark.parametrize(
    ("ids", "weight"),
    [
        (torch.zeros(3, 2, dtype=torch.int64).t(), X),
        (torch.zeros(3, dtype=torch.int64).expand(2, 3), X),
        (torch.zeros(0, dtype=torch.int64), X),
        (torch.zeros((1,) * 8, dtype=torch.int64), X),
        (torch.zeros(3, dtype=torch.int64), X.t()),
        (torch.zeros(3, dtype=torch.int64), X.double()),
    ],
)
def test_lookups_that_go_the_long_way(answers: list[bool], ids: torch.Tensor, weight: torch.Tensor) -> None:
    assert torch.equal(ops.embedding(ids, weight), weight[ids])
    assert answers == [False]


@needs_api
@pytest.mark.parametrize(
    "arguments",
    [(), (X,), (X, W, B, None, 1e-5, False, False, None)],
)
def test_the_number_of_arguments(arguments: tuple) -> None:
    with pytest.raises(TypeError, match=f"wanted 7 arguments, got {len(arguments)}"):
        native.C.layer_norm_forward_torch(*arguments)


@needs_api
@pytest.mark.parametrize("other", [None, 3, "x", [1.0], torch.device("cpu"), X.int(), X.to_sparse(), X.to("meta")])
def test_anything_may_be_given(other: Any) -> None:
    forward, backward = native.C.layer_norm_forward_torch, native.C.layer_norm_backward_torch
    _, _, statistics = forward(X, W, B, None, 1e-5, False, True)
    good = [X, W, B, X, 1e-5]
    for i in range(5):
        bad = [*good[:i], other, *good[i + 1 :]]
        assert forward(*bad, False, False) is None or (other is None and i in (2, 3))
    good = [X, X, X, W, statistics]
    for i in range(5):
        bad = [*good[:i], other, *good[i + 1 :]]
        assert backward(*bad, True, True) is None or (other is None and i == 1)


def test_the_graph_of_the_backward_pass_is_refused() -> None:
    x, dy = X.clone().requires_grad_(), torch.randn(4, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.layer_norm(x, W), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("api", [True, False])
@pytest.mark.parametrize("rows", [4, 1024])
def test_nothing_is_left_behind(rows: int, api: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, r = torch.randn(rows, 64, requires_grad=True), torch.randn(rows, 64)
    weight, bias = W.clone().requires_grad_(), B.clone().requires_grad_()
    if not api:
        without_api(monkeypatch)

    def calls(count: int) -> None:
        for _ in range(count):
            outputs = ops.layer_norm(x, weight, bias, residual=r)
            torch.autograd.grad(outputs, (x, weight, bias), (r, r))
            with torch.no_grad():
                ops.layer_norm(x, weight, bias)
            with pytest.raises(ValueError) if count < 100 else nullcontext():
                ops.layer_norm(x, weight[:5] if count < 100 else weight)

    calls(10)
    gc.collect()
    tracked = (x, r, weight, bias, None, torch.Tensor, torch.nn.Parameter)
    used, references = memory.state().used, [sys.getrefcount(t) for t in tracked]
    objects = len(gc.get_objects())
    count = 10_000 if rows == 4 else 4_000
    calls(count)
    gc.collect()
    assert memory.state().used == used
    # What a call left behind would be there `count` times; other references to None come and go by hundreds.
    for before, after in zip(references, [sys.getrefcount(t) for t in tracked], strict=True):
        assert abs(after - before) < count / 2
    assert abs(len(gc.get_objects()) - objects) < count / 2


@needs_api
def test_results_outlive_what_they_were_made_of() -> None:
    x = torch.randn(1024, 768)
    y, h = ops.layer_norm(x, torch.ones(768), residual=torch.zeros_like(x))
    view, wanted = y[3:5], torch.nn.functional.layer_norm(x[3:5], (768,))
    del y, h, x
    gc.collect()
    memory.release()
    torch.testing.assert_close(view, wanted)


def test_threads() -> None:
    wrong: list[str] = []
    torch.manual_seed(0)
    x, weight = torch.randn(256, 300, requires_grad=True), torch.randn(300, requires_grad=True)
    wanted = torch.autograd.grad(ops.rms_norm(x, weight), (x, weight), torch.ones_like(x))

    def work() -> None:
        for _ in range(100):
            got = torch.autograd.grad(ops.rms_norm(x, weight), (x, weight), torch.ones_like(x))
            wrong.extend("bits" for a, b in zip(got, wanted, strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_torch_without_the_api() -> None:
    class Old:  # the type of tensors before torch 2.10
        pass

    class Strange:
        __dlpack_c_exchange_api__ = "no capsule"

    try:
        assert not native.C.connect_torch(Old, torch.nn.Parameter)
        assert not native.C.connect_torch(Strange, torch.nn.Parameter)
        assert native.C.layer_norm_forward_torch(X, W, B, None, 1e-5, False, False) is None
        torch.testing.assert_close(ops.layer_norm(X, W, B), torch.nn.functional.layer_norm(X, (64,), W, B))
    finally:
        native.C.connect_torch(torch.Tensor, torch.nn.Parameter)
