"""What is particular to embedding: bad input, rows that do not occur, long sums, threads. The suite has the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm
from fastlm.nn import Embedding
from fastlm.ops import embedding
from fastlm.ops.case import Case
from fastlm.ops.embedding.cases import _build, eager_embedding
from fastlm.ops.embedding.tied import tied_embedding
from tests.op_suite import BACKENDS, check_case

IDS, WEIGHT = torch.tensor([[1, 4, 1], [0, 2, 4]]), torch.randn(5, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": IDS.float()}, "ids must be int64 or int32, got torch.float32"),
        ({"weight": WEIGHT[0]}, r"weight must have shape \(V, C\) with C > 0, got \(8,\)"),
        ({"weight": WEIGHT.long()}, "weight must be float32, bfloat16, float16 or float64, got torch.int64"),
        ({"weight": WEIGHT.to("meta")}, "ids is on cpu, but weight is on meta"),
        ({"padding_idx": 5}, "padding_idx must be from -5 to 4, got 5"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedding(**{"ids": IDS, "weight": WEIGHT, **arguments})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_an_id_out_of_range(backend: str, bad: int) -> None:
    ids = torch.tensor([0, bad, 1])
    with fastlm.backend(backend), pytest.raises(ValueError, match=f"id {bad} .*is out of range; wanted 0 to 4"):
        embedding(ids, WEIGHT)


def test_the_cuda_kernel_gives_nan_and_no_gradient_for_it() -> None:
    ids = torch.tensor([1, -1, 5, 1, 2**32 + 1, 4])
    weight = WEIGHT.clone().requires_grad_()
    with fastlm.backend("emulator"):
        try:
            y = embedding(ids, weight)
        except fastlm.UnsupportedError as reason:
            pytest.skip(str(reason))
        assert y[[1, 2, 4]].isnan().all() and torch.equal(y[[0, 3, 5]], WEIGHT[[1, 1, 4]])
        y.backward(torch.ones_like(y))
    assert torch.equal(weight.grad[:, 0], torch.tensor([0.0, 2.0, 0.0, 0.0, 1.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sums_do_not_lose_what_a_sum_in_the_weights_dtype_would(backend: str) -> None:
    """4000 ones in bfloat16: added up in it they would stop at 256."""
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    with fastlm.backend(backend):
        try:
            y = embedding(torch.ones(4000, dtype=torch.int64), weight)
        except fastlm.UnsupportedError as reason:
            pytest.skip(str(reason))
        y.backward(torch.ones_like(y))
    assert weight.grad[1].tolist() == [4000.0] * 4 and not weight.grad[[0, 2]].any()


def test_gradient_is_the_same_for_any_number_of_threads() -> None:
    ids = torch.randint(0, 60, (4000,)) ** 2 // 60  # small ids are common
    dy, results = torch.randn(4000, 33), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            weight = torch.zeros(60, 33, requires_grad=True)
            embedding(ids, weight).backward(dy)
            results.append(weight.grad)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_module_is_torchs() -> None:
    module, theirs = Embedding(5, 8, padding_idx=2), torch.nn.Embedding(5, 8, padding_idx=2)
    theirs.load_state_dict(module.state_dict())
    assert torch.equal(module(IDS), theirs(IDS))
    module(IDS).square().sum().backward()
    theirs(IDS).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, theirs.weight.grad)
    with pytest.raises(ValueError, match="sparse=True is not supported"):
        Embedding(5, 8, sparse=True)


@pytest.mark.parametrize("uses", ["both", "lookup", "head"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 9), (7, 31)])  # none, less and more places than rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_table_has_the_sum_of_both_gradients(backend: str, dtype: torch.dtype, shape: tuple, uses: str) -> None:
    ids = torch.randint(1, 60, shape)
    weight = torch.randn(60, 12, dtype=dtype, requires_grad=True)
    dy, dhead = torch.randn(*shape, 12, dtype=dtype), torch.randn(60, 12, dtype=dtype)

    def gradient(y: torch.Tensor, head: torch.Tensor, **options: bool) -> torch.Tensor:
        outputs = {"both": [y, head], "lookup": [y], "head": [head]}[uses]
        upstream = {"both": [dy, dhead.clone()], "lookup": [dy], "head": [dhead.clone()]}[uses]
        return torch.autograd.grad(outputs, weight, upstream, **options)[0]

    with fastlm.backend(backend):
        try:
            wanted = gradient(embedding(ids, weight), weight.view_as(weight))
        except fastlm.UnsupportedError as reason:
            pytest.skip(str(reason))
        outputs = tied_embedding(ids, weight)
        assert torch.equal(outputs[0], weight[ids]) and outputs[1].data_ptr() == weight.data_ptr()
        first, second = gradient(*outputs, retain_graph=True), gradient(*outputs)
    assert torch.equal(first, wanted) and torch.equal(second, wanted)


def test_the_gradient_of_a_tied_head_is_written_to_only_where_nobody_wants_it_again() -> None:
    weight, dhead = torch.zeros(60, 8, requires_grad=True), torch.ones(60, 8)
    y, head = tied_embedding(torch.tensor([3, 3]), weight)
    kept = torch.autograd.grad([y, head], weight, [torch.ones(2, 8), dhead], retain_graph=True)[0]
    assert kept[3].tolist() == [3.0] * 8 and torch.equal(dhead, torch.ones(60, 8))
    last = torch.autograd.grad([y, head], weight, [torch.ones(2, 8), dhead])[0]
    assert last.data_ptr() == dhead.data_ptr() and torch.equal(last, kept)
    y, head = tied_embedding(torch.tensor([3, 3]), weight)
    (y.sum() + head.sum()).backward()  # whose gradients are one number, expanded
    assert torch.equal(weight.grad, kept)


def test_an_id_out_of_range_of_a_tied_table_has_no_gradient_on_cuda() -> None:
    weight = WEIGHT.clone().requires_grad_()
    with fastlm.backend("emulator"):
        try:
            y, head = tied_embedding(torch.tensor([7, 1, -1, 1]), weight)
        except fastlm.UnsupportedError as reason:
            pytest.skip(str(reason))
        torch.autograd.backward([y, head], [torch.ones_like(y), torch.ones_like(head)])
    assert torch.equal(weight.grad[:, 0], torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 80), max_size=2).map(tuple),
    vocabulary=st.integers(1, 40),
    cols=st.integers(1, 70),
    ids=st.sampled_from([torch.int64, torch.int32]),
    common=st.sampled_from([0.0, 0.3, 0.95]),
    padding=st.sampled_from([None, 0, -1]),
    layout=st.sampled_from(["", "sliced"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_fuzz(backend, shape, vocabulary, cols, ids, common, padding, layout, dtype) -> None:
    if backend == "triton" and not torch.cuda.is_available():  # a program each, one after the other
        shape = tuple(min(n, 12) for n in shape)
    if len(shape) < 2:
        layout = ""
    common = common if vocabulary > 1 else 0.0
    build = _build(shape, vocabulary, cols, ids, common, layout, padding_idx=padding)
    check_case(backend, Case("embedding", "fuzz", build, eager_embedding), dtype)
