"""decode_attention: every backend against float64, alone and in a batch, pages, garbage beyond the end, bad input."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm
from fastlm import ops
from fastlm.ops import decode_attention, native
from fastlm.ops.case import Case, Maker
from fastlm.ops.decode_attention.cases import SMALL, _build, eager_decode_attention
from fastlm.ops.decode_attention.native import append
from tests.emulator import backend as emulator
from tests.op_suite import BACKENDS, DTYPES, check, device_of, wide


def run(backend: str, arguments: dict) -> torch.Tensor:
    with fastlm.backend(backend):
        try:
            return decode_attention(**arguments)
        except fastlm.UnsupportedError as reason:
            pytest.skip(str(reason))


def judge(backend: str, case: Case, dtype: torch.dtype) -> None:
    arguments = case.build(Maker(dtype, device_of(backend)))
    got = run(backend, arguments)
    assert torch.equal(got, run(backend, arguments)), "two runs differ"
    wanted = run("reference", wide(arguments))
    check("out", got, wanted, eager_decode_attention(**arguments), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str, case: Case, dtype: torch.dtype) -> None:
    judge(backend, case, dtype)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_reference_is_eager_attention(case: Case) -> None:
    arguments = case.build(Maker(torch.float64))
    torch.testing.assert_close(run("reference", arguments), eager_decode_attention(**arguments))


def test_it_is_the_attention_of_the_last_rows() -> None:
    q, k, v = (torch.randn(2, 90, h, 32) for h in (4, 2, 2))
    full = ops.attention(q, k, v, causal=True, window=(30, 0), softcap=5.0)
    lengths = torch.full((2,), 90, dtype=torch.int32)
    last = decode_attention(q[:, -3:], k, v, lengths, window=30, softcap=5.0)
    torch.testing.assert_close(last, full[:, -3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_in_pages(backend: str) -> None:
    arguments = _build((5, 300, 129, 40), 1, 4, 2, 64, 512)(Maker(torch.bfloat16, device_of(backend)))
    together = run(backend, arguments)
    for b in range(4):
        alone = {k: v[b : b + 1] for k, v in arguments.items()}
        alone["k_cache"], alone["v_cache"] = (alone[k][:, :320] for k in ("k_cache", "v_cache"))
        if backend != "reference":
            assert torch.equal(run(backend, alone), together[b : b + 1])
    pages = {k: arguments[k].reshape(4 * 32, 16, 2, 64) for k in ("k_cache", "v_cache")}
    table = torch.arange(4 * 32, dtype=torch.int32, device=device_of(backend)).view(4, 32)
    assert torch.equal(run(backend, {**arguments, **pages, "block_table": table}), together)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_beyond_a_sequence_is_not_looked_at(backend: str) -> None:
    arguments = _build((40, 130), 1, 2, 1, 32, 200)(Maker(torch.float32, device_of(backend)))
    wanted = run(backend, arguments)
    for name in ("k_cache", "v_cache"):
        for b, n in enumerate((40, 130)):
            arguments[name][b, n:] = torch.nan
    assert torch.equal(run(backend, arguments), wanted)
    arguments["k_cache"][0, 7] = torch.nan
    spoilt = run(backend, arguments)
    assert spoilt[0].isnan().all() and torch.equal(spoilt[1], wanted[1])


def test_any_number_of_threads() -> None:
    arguments = _build((900, 300), 1, 8, 4, 64, 1000)(Maker(torch.float32))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(decode_attention(**arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_lengths_and_pages_out_of_range(backend: str) -> None:
    arguments = _build((9, 4), 1, 2, 1, 16, 16, page=4)(Maker())
    for lengths in ([9, 17], [9, -1]):
        with pytest.raises(ValueError, match=f"length of sequence 1 is {lengths[1]}; wanted 0 to 16"):
            run(backend, {**arguments, "cache_lengths": torch.tensor(lengths, dtype=torch.int32)})
    table = arguments["block_table"].clone()
    table[0, 3], table[1, 1] = 99, -5  # beyond the ends: not looked at
    assert torch.equal(run(backend, {**arguments, "block_table": table}), run(backend, arguments))
    table[0, 2] = 99
    with pytest.raises(ValueError, match="page 2 of sequence 0 is 99; wanted 0 to 10"):
        run(backend, {**arguments, "block_table": table})


def test_the_cuda_kernel_leaves_out_pages_and_tokens_out_of_range() -> None:
    arguments = _build((9, 16), 1, 2, 1, 16, 16, page=4)(Maker())
    wanted = run("emulator", arguments)
    table = arguments["block_table"].clone()
    table[0, 0] = 99
    lengths = torch.tensor([9, 1000], dtype=torch.int32)
    got = run("emulator", {**arguments, "block_table": table, "cache_lengths": lengths})
    assert torch.equal(got[1], wanted[1]) and got[0].isfinite().all() and not torch.equal(got[0], wanted[0])


Q, CACHE, LENGTHS = torch.randn(2, 1, 4, 16), torch.randn(2, 8, 2, 16), torch.tensor([3, 8], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": Q[0]}, r"q must have 4 dimensions, got \(1, 4, 16\)"),
        ({"q": Q.half()}, "k_cache is torch.float32, but q is torch.float16"),
        ({"q": torch.randn(2, 17, 4, 16)}, "at most 16 new tokens a sequence, got 17"),
        ({"k_cache": CACHE[:1]}, r"k_cache must have shape \(B, S, H_kv, D\) = \(2, S, H_kv, 16\)"),
        ({"v_cache": CACHE[:, :5]}, "v_cache must have shape of k_cache"),
        ({"q": torch.randn(2, 1, 3, 16)}, "must divide those of q, got 2 and 3"),
        ({"cache_lengths": LENGTHS.long()}, r"cache_lengths must be int32 of shape \(B\) = \(2,\), got torch.int64"),
        ({"block_table": torch.zeros(2, 2)}, r"block_table must be int32 of shape \(B, M\) = \(2, M\)"),
        ({"window": -1}, "window must be None or not negative, got -1"),
        ({"softcap": -1.0}, r"softcap must be 0 \(none\) or positive, got -1.0"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must have shape \(H\) = \(4,\) or .* got \(3,\)"),
        ({"q": Q.clone().requires_grad_()}, "has no backward pass"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "has no backward pass"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_attention(**{"q": Q, "k_cache": CACHE, "v_cache": CACHE, "cache_lengths": LENGTHS, **arguments})


def test_under_compile_and_opcheck() -> None:
    arguments = SMALL[2].build(Maker())
    torch._dynamo.reset()
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), decode_attention(**arguments))
    names = ("q", "k_cache", "v_cache", "cache_lengths", "block_table")
    call = (*(arguments[name] for name in names), None, 0.1, -1, 0.0, "cpu")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastlm.decode_attention.default, call, test_utils=tests)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 280), min_size=1, max_size=3).map(tuple),
    rows=st.integers(1, 6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    width=st.sampled_from([1, 8, 20, 64, 72, 128]),
    page=st.sampled_from([0, 0, 1, 16, 50]),
    window=st.sampled_from([None, None, 0, 7, 150]),
    softcap=st.sampled_from([0.0, 2.0]),
    alibi=st.sampled_from([0, 1, 2]),
    dtype=st.sampled_from(DTYPES),
)
def test_fuzz(backend, lengths, rows, kv_heads, group, width, page, window, softcap, alibi, dtype) -> None:
    options = {"window": window, "softcap": softcap, "page": page, "alibi": alibi}
    build = _build(lengths, rows, kv_heads * group, kv_heads, width, 300, **options)
    judge(backend, Case("decode_attention", "fuzz", build, eager_decode_attention), dtype)


@pytest.mark.parametrize("on", ["cpu", "emulator", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [5, 64])
def test_append(on: str, dtype: torch.dtype, width: int) -> None:
    """Into a part of a larger cache, from a part of a packed projection; nothing else is touched."""
    reason = {"cpu": lambda: None, "emulator": emulator.unavailable, "cuda": native.cuda_unavailable}[on]()
    if reason is not None:
        pytest.skip(reason)
    device = "cuda" if on == "cuda" else "cpu"
    k_cache, v_cache = (torch.randn(4, 9, 2, width, device=device).to(dtype)[1:] for _ in range(2))
    k, v = (
        torch.randn(3, 6, width, device=device).to(dtype).split((4, 2), dim=1)[1],
        torch.randn(3, 2, width).to(k_cache),
    )
    at = torch.tensor([0, 8, 3], device=device)
    wanted = k_cache.clone(), v_cache.clone()
    for b, row in enumerate(at.tolist()):
        wanted[0][b, row], wanted[1][b, row] = k[b], v[b]
    with emulator.emulated() if on == "emulator" else nullcontext():
        append(k_cache, v_cache, k, v, at)
    assert torch.equal(k_cache, wanted[0]) and torch.equal(v_cache, wanted[1])
