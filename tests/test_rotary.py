"""What is particular to rotary: bad input, in place, its inverse, positions, threads. The suite has the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm
from fastlm.ops import rotary
from fastlm.ops.case import Case, Maker
from fastlm.ops.rotary.cases import _build, eager_rotary
from tests.op_suite import BACKENDS, check_case

Q, K = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
ANGLES = torch.randn(5, 8)


def angles_of(arguments: dict) -> dict:
    return {"q": Q, "k": K, "cos": ANGLES.cos(), "sin": ANGLES.sin(), **arguments}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": Q[0]}, r"q must have 4 dimensions \(batch, length, heads, dim\), got \(5, 4, 16\)"),
        ({"k": K.half()}, "k is torch.float16, but q is torch.float32"),
        ({"k": K[:, :4]}, r"k must have shape \(B, T, H_kv, D\) = \(2, 5, H_kv, 16\)"),
        ({"cos": ANGLES.half()}, "cos and sin must be torch.float32 beside torch.float32 q, got torch.float16"),
        ({"cos": ANGLES[:4]}, r"cos must have shape \(T, R/2\) or \(B, T, R/2\) with B = 2, T = 5, got \(4, 8\)"),
        ({"sin": ANGLES[:, :4]}, r"sin must have shape of cos = \(5, 8\), got \(5, 4\)"),
        ({"cos": torch.ones(5, 9), "sin": torch.ones(5, 9)}, "9 angles a token, for more than the 16 dimensions"),
        ({"positions": torch.zeros(5)}, "positions must be int64 or int32, got torch.float32"),
        (
            {"positions": torch.zeros(4, dtype=torch.int64)},
            r"positions must have shape \(T\) = \(5,\) or .* got \(4,\)",
        ),
        ({"cos": ANGLES.clone().requires_grad_()}, "cos and sin get no gradient, but one of them requires it"),
        ({"q": Q.clone().requires_grad_(), "inplace": True}, "inplace is for calls without gradients, but q requires"),
        ({"k": K[:1].expand(2, 5, 2, 16), "inplace": True}, "inplace cannot write to k, whose elements share memory"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary(**angles_of(arguments))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_outside_of_the_tables(backend: str, position: int) -> None:
    positions = torch.tensor([0, 1, position, 2, 3])
    with fastlm.backend(backend), pytest.raises(ValueError, match=f"position {position} .*is not a row of the tables"):
        rotary(**angles_of({"positions": positions}))


def test_the_cuda_kernel_marks_such_a_token_with_nan() -> None:
    with fastlm.backend("emulator"):
        try:
            q, k = rotary(**angles_of({"positions": torch.tensor([0, 1, -1, 5, 3])}))
        except fastlm.UnsupportedError as reason:
            pytest.skip(str(reason))
    for t in (q, k):
        assert t[:, 2:4].isnan().all() and t[:, [0, 1, 4]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["packed", "transposed"])
def test_in_place_is_the_same(backend: str, interleaved: bool, layout: str) -> None:
    arguments = _build(2, 6, 4, 2, 64, 48, layout=layout, interleaved=interleaved)(Maker(torch.bfloat16))
    q, k = arguments["q"], arguments["k"]
    with fastlm.backend(backend):
        try:
            wanted = rotary(**arguments)
        except fastlm.UnsupportedError as reason:
            pytest.skip(str(reason))
        before = q.clone()
        result = rotary(**arguments, inplace=True)
    assert result[0] is q and result[1] is k and not torch.equal(q, before)
    assert torch.equal(q, wanted[0]) and torch.equal(k, wanted[1])


def test_in_place_leaves_the_values_of_a_projection_alone() -> None:
    packed = torch.randn(2, 5, 8, 16)
    before = packed.clone()
    q, k, v = packed.tensor_split((4, 6), dim=2)
    rotary(q, k, ANGLES.cos(), ANGLES.sin(), inplace=True)
    assert torch.equal(v, before[:, :, 6:]) and not torch.equal(packed[:, :, :6], before[:, :, :6])


def test_in_place_under_compile() -> None:
    def run(q, k):
        q, k = q.clone(), k.clone()
        return rotary(q, k, ANGLES.cos(), ANGLES.sin(), inplace=True)

    torch._dynamo.reset()
    with torch.no_grad():
        got, wanted = torch.compile(run, fullgraph=True, backend="aot_eager")(Q, K), run(Q, K)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_of_the_outputs_is_used(backend: str) -> None:
    for pick in (0, 1):
        q, k = Q.clone().requires_grad_(), K.clone().requires_grad_()
        with fastlm.backend(backend):
            try:
                out = rotary(q, k, ANGLES.cos(), ANGLES.sin())[pick]
            except fastlm.UnsupportedError as reason:
                pytest.skip(str(reason))
            out.square().sum().backward()
        used, unused = (q, k) if pick == 0 else (k, q)
        torch.testing.assert_close(used.grad, 2 * used.detach())  # a rotation keeps lengths
        assert unused.grad is None


def test_lengths_and_relative_positions() -> None:
    """A rotation keeps the length of a head, and q . k depends on the difference of the positions alone."""
    q, k = torch.randn(1, 1, 1, 16).expand(1, 9, 1, 16), torch.randn(1, 1, 1, 16).expand(1, 9, 1, 16)
    angles = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.01, 1e-3, 0.3, 0.2, 0.7])
    for interleaved in (False, True):
        turned_q, turned_k = rotary(q, k, angles.cos(), angles.sin(), interleaved=interleaved)
        torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
        scores = turned_q[0, :, 0] @ turned_k[0, :, 0].T
        torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    length=st.integers(1, 6),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 2),
    width=st.integers(2, 96),
    turned=st.integers(1, 48),
    rows=st.sampled_from(["", "each", "positions", "each-positions"]),
    layout=st.sampled_from(["", "packed", "transposed"]),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_fuzz(backend, batch, length, heads, kv_heads, width, turned, rows, layout, interleaved, dtype) -> None:
    turned = 2 * min(turned, width // 2)
    build = _build(batch, length, heads, kv_heads, width, turned, rows, layout, interleaved=interleaved)
    check_case(backend, Case("rotary", "fuzz", build, eager_rotary), dtype)
