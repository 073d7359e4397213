"""What is special to attention; its cases run in the common suite (test_ops.py)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.ops import attention, attention_qkvpacked, philox, registry
from fastlm.ops.attention.cases import CASES, slices
from fastlm.ops.case import Case, Maker
from tests.op_suite import run


@pytest.fixture(params=sorted(registry.implementations()["attention"]))
def backend(request: pytest.FixtureRequest):
    """Each backend of attention on CPU tensors that this machine has."""
    reason = registry.unavailable(request.param)
    if reason is None and request.param in ("cuda", "triton"):
        reason = "these tests use CPU tensors"
    if reason is not None:
        pytest.skip(reason)
    with fastlm.backend(request.param):
        yield request.param


def qkv(batch=2, length=12, columns=None, heads=2, kv_heads=None, width=16, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns, kv_heads = length if columns is None else columns, kv_heads or heads
    shapes = [(batch, length, heads, width), *[(batch, columns, kv_heads, width)] * 2]
    return tuple(torch.randn(s, generator=generator) for s in shapes)  # type: ignore[return-value]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **options).transpose(1, 2)


def test_agrees_with_torch(backend: str) -> None:
    """Against an implementation that is not ours."""
    q, k, v = qkv(length=70, width=32)
    torch.testing.assert_close(attention(q, k, v), sdpa(q, k, v))
    torch.testing.assert_close(attention(q, k, v, causal=True), sdpa(q, k, v, is_causal=True))
    q, k, v = qkv(length=20, columns=50, heads=4, kv_heads=2)
    visible = torch.ones(20, 50).tril(30).bool()
    torch.testing.assert_close(
        attention(q, k, v, causal=True, scale=0.5), sdpa(q, k, v, attn_mask=visible, scale=0.5, enable_gqa=True)
    )


def test_packed_sequences_are_separate_calls(backend: str) -> None:
    lengths = [9, 0, 30, 1]
    q, k, v = qkv(batch=1, length=40)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    out, lse = attention(q, k, v, causal=True, cu_seqlens=ends, return_lse=True)
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        alone, lse_alone = attention(q[:, a:b], k[:, a:b], v[:, a:b], causal=True, return_lse=True)
        torch.testing.assert_close(out[:, a:b], alone)
        torch.testing.assert_close(lse[:, :, a:b], lse_alone)


def test_decoding_step_by_step_is_the_causal_pass(backend: str) -> None:
    q, k, v = qkv(length=30, heads=4, kv_heads=2)
    whole = attention(q, k, v, causal=True)
    for t in range(1, 31):
        step = attention(q[:, t - 1 : t], k[:, :t], v[:, :t], causal=True)
        torch.testing.assert_close(step, whole[:, t - 1 : t])


def test_rows_that_see_nothing(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(length=10, columns=4))
    out, lse = attention(q, k, v, causal=True, return_lse=True)  # rows 0 to 5 see nothing
    assert not out[:, :6].any() and torch.isneginf(lse[:, :, :6]).all()
    assert lse[:, :, 6:].isfinite().all() and out[:, 6:].all()
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, :, 6:].sum(), (q, k, v))
    assert not dq[:, :6].any() and all(g.isfinite().all() for g in (dq, dk, dv))
    dq, dk, dv = torch.autograd.grad(attention(q, k, v, causal=True)[:, :6].sum(), (q, k, v))
    assert not any(g.any() for g in (dq, dk, dv))


@pytest.mark.parametrize("options", [{"window": (0, 0)}, {"cu_seqlens": torch.arange(8, dtype=torch.int32)}], ids=str)
def test_a_row_that_sees_one_column_copies_its_value(backend: str, options: dict) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(batch=1, length=7, heads=4, kv_heads=2))
    out, lse = attention(q, k, v, return_lse=True, **options)
    values = v.repeat_interleave(2, 2)
    torch.testing.assert_close(out, values)
    torch.testing.assert_close(lse, (q * k.repeat_interleave(2, 2)).sum(-1).transpose(1, 2) / 4)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), upstream)
    torch.testing.assert_close(dv, upstream.view(1, 7, 2, 2, 16).sum(3))
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5  # the softmax of one score is 1, whatever the score


def test_nothing_at_all(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(length=5, columns=0))
    out, lse = attention(q, k, v, return_lse=True)
    assert not out.any() and torch.isneginf(lse).all()
    assert not torch.autograd.grad(out.sum(), q)[0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_infinity_show_where_textbook_attention_shows_them(backend: str, where: str, bad: float) -> None:
    """A bad number in one position reaches every row that sees it, and no row of another batch entry or head."""
    if backend in ("cuda", "emulator") and math.isinf(bad):
        pytest.skip("float32 products of three in tf32: an infinite element makes NaN of what it multiplies")
    arguments = dict(zip("qkv", qkv(length=40, width=16), strict=True))
    arguments[where][0, 17, 1, 3] = bad
    out = attention(**arguments)
    wanted = next(c for c in CASES).eager(**arguments)
    assert torch.equal(out.isfinite(), wanted.isfinite())
    assert torch.equal(out.isnan(), wanted.isnan())
    finite = wanted.isfinite()
    torch.testing.assert_close(out[finite], wanted[finite])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_far_beyond_the_range_of_exp(backend: str, dtype: torch.dtype) -> None:
    """Scores of +-10,000: the largest takes all, nothing overflows."""
    q = torch.full((1, 3, 1, 8), 30.0, dtype=dtype)
    k = torch.tensor([1.0, -1.0, 0.5, 1.5]).view(1, 4, 1, 1).expand(1, 4, 1, 8).to(dtype)
    v = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 1, 8).to(dtype)
    out, lse = attention(q, k, v, scale=30.0, return_lse=True)
    torch.testing.assert_close(out, torch.full_like(out, 3.0))
    torch.testing.assert_close(lse, torch.full_like(lse, 10800.0))


def test_dropout(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(length=64, columns=100, width=32))
    torch.manual_seed(5)
    out = attention(q, k, v, dropout_p=0.4)
    state_after = torch.random.get_rng_state()
    dv = torch.autograd.grad(out, v, torch.ones_like(out))[0]
    torch.manual_seed(5)
    state = philox.draw_state(q.device)
    assert torch.equal(torch.random.get_rng_state(), state_after), "one draw from the default generator a call"
    kept = philox.keep_mask(state, 0.4, torch.arange(4).view(2, 2), range(64), range(100))
    weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / 32**0.5, -1) * kept / 0.6
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", weights, v))
    torch.testing.assert_close(dv, weights.sum(2).transpose(1, 2)[..., None].expand_as(v))
    assert not torch.equal(out, attention(q, k, v, dropout_p=0.4)), "each call draws its own mask"
    assert torch.equal(attention(q, k, v, dropout_p=0.0), attention(q, k, v))


def test_gradient_through_lse_alone(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(length=9))
    _, lse = attention(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True)
    weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / 4, -1)
    torch.testing.assert_close(dq, torch.einsum("bhij,bjhd->bihd", weights, k) / 4)
    torch.testing.assert_close(dk, torch.einsum("bhij,bihd->bjhd", weights, q) / 4)
    assert dv is None or not dv.any()


def test_double_backward_is_refused(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    out = attention(q, k, v)
    (dq,) = torch.autograd.grad(out, q, torch.ones_like(out, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_slices_of_a_projection_are_not_copied(backend: str) -> None:
    """The outputs are contiguous; the inputs keep their strides up to the raw op."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastlm":
                seen.append([a.stride() for a in args if isinstance(a, Tensor) and a.dim() == 4])
            return func(*args, **(kwargs or {}))

    projection = torch.randn(2, 9, 3, 2, 16)
    with Spy():
        out = attention(*projection.unbind(2), causal=True)
    assert seen == [[projection[:, :, 0].stride()] * 3] and out.is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(q=a["q"][0]), r"q must have 4 dimensions .*\(12, 2, 16\)"),
        (lambda a: a.update(k=a["k"][..., :8]), r"k must have shape \(B, S, H_kv, D\) = \(2, S, H_kv, 16\)"),
        (lambda a: a.update(k=a["k"][:1]), "k must have shape"),
        (lambda a: a.update(v=a["v"][:, :5]), r"v must have shape of k = \(2, 12, 2, 16\), got \(2, 5, 2, 16\)"),
        (lambda a: a.update(q=torch.randn(2, 12, 3, 16)), "heads of k and v must divide those of q, got 2 and 3"),
        (lambda a: a.update(k=a["k"][:, :, :0], v=a["v"][:, :, :0]), "must divide"),
        (lambda a: a.update(k=a["k"].double()), "k is torch.float64, but q is torch.float32"),
        (lambda a: a.update({n: a[n].long() for n in "qkv"}), "must be float32, bfloat16, float16 or float64"),
        (lambda a: a.update({n: a[n][..., :0] for n in "qkv"}), "head dim must not be 0"),
        (lambda a: a.update(k=a["k"].to("meta")), "k is on meta, but q is on cpu"),
        (lambda a: a.update(scale=float("nan")), "scale must be finite, got nan"),
        (lambda a: a.update(window=5), r"window must be None or \(left, right\), got 5"),
        (lambda a: a.update(window=(-3, 0)), r"got \(-3, 0\)"),
        (lambda a: a.update(softcap=-1.0), "softcap must be 0 .* got -1.0"),
        (lambda a: a.update(dropout_p=1.0), r"dropout_p must be in \[0, 1\), got 1.0"),
        (lambda a: a.update(dropout_p=-0.1), "dropout_p"),
        (lambda a: a.update(alibi_slopes=torch.ones(3)), r"alibi_slopes must have shape .* got \(3,\)"),
        (lambda a: a.update(alibi_slopes=torch.ones(2).int()), "alibi_slopes must be float32"),
        (lambda a: a.update(alibi_slopes=torch.ones(2, requires_grad=True)), "alibi_slopes get no gradient"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 12])), "cu_seqlens must be int32 .* got torch.int64"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0], dtype=torch.int32)), "cu_seqlens must be int32 of shape"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 12]).int()), "packed sequences have batch 1"),
        (lambda a: a.update(max_seqlen=12), "max_seqlen goes with cu_seqlens"),
    ],
)
def test_bad_input(change, message: str) -> None:
    arguments = dict(zip("qkv", qkv(), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        attention(**arguments)


@pytest.mark.parametrize("ends", [[1, 12], [0, 11], [0, 13], [0, 8, 5, 12]], ids=str)
def test_boundaries_that_do_not_fit(backend: str, ends: list) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 12"):
        attention(*qkv(batch=1), cu_seqlens=torch.tensor(ends, dtype=torch.int32))


def test_max_seqlen_that_is_too_short(backend: str) -> None:
    ends = torch.tensor([0, 3, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="max_seqlen is 8, but the longest sequence has 9"):
        attention(*qkv(batch=1), cu_seqlens=ends, max_seqlen=8)


@pytest.mark.parametrize("name", ["everything", "packed-window-alibi", "dropout-packed", "slices-of-one-projection"])
def test_compiles_with_options(name: str) -> None:
    """Data-dependent parts (cu_seqlens, the drawn dropout state) stay inside one graph."""
    torch._dynamo.reset()
    case = next(c for c in CASES if c.name == name)
    arguments = case.build(Maker())
    outputs, gradients, upstream = run(attention, arguments)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    got, got_gradients, _ = run(compiled, arguments, upstream)
    for a, b in zip([*got, *got_gradients], [*outputs, *gradients], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["everything", "everything-packed", "dropout-gqa-full"])
def test_opcheck_with_options(name: str) -> None:
    arguments = next(c for c in CASES if c.name == name).build(Maker())
    arguments.pop("return_lse")
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastlm":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        run(attention, arguments)
    assert len(calls) == 2
    for func, args in calls:
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


# attention_qkvpacked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [c for c in CASES if c.op == "attention_qkvpacked" and not c.bench], ids=str)
def test_qkvpacked_has_the_bits_of_attention(backend: str, case: Case, dtype: torch.dtype) -> None:
    arguments = case.build(Maker(dtype))
    qkv, n_head, n_kv_head = (arguments.pop(name) for name in ("qkv", "n_head", "n_kv_head"))
    if qkv.numel() == 0:
        pytest.skip("nothing to compare")

    def on_slices(qkv: Tensor) -> Tensor:
        return attention(*slices(qkv, n_head, n_kv_head), **arguments)

    def packed(qkv: Tensor) -> Tensor:
        return attention_qkvpacked(qkv, n_head, n_kv_head, **arguments)

    (out,), (dqkv,), upstream = run(packed, {"qkv": qkv})
    (wanted,), (dqkv_wanted,), _ = run(on_slices, {"qkv": qkv}, upstream)
    assert torch.equal(out, wanted) and torch.equal(dqkv, dqkv_wanted)
    assert out.is_contiguous() and dqkv.is_contiguous()


def test_qkvpacked_has_as_many_heads_of_k_and_v_unless_told_otherwise() -> None:
    qkv = torch.randn(2, 5, 3 * 2 * 8)
    assert torch.equal(attention_qkvpacked(qkv, 2), attention_qkvpacked(qkv, 2, 2))


def test_qkvpacked_makes_its_gradient_in_one_op() -> None:
    """No concatenation, no zeros, no sum."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    qkv = torch.randn(2, 9, 3 * 2 * 16, requires_grad=True)
    out = attention_qkvpacked(qkv, 2, causal=True)
    with Spy():
        torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert [name for name in seen if "detach" not in name and "ones_like" not in name] == [
        "fastlm::attention_qkvpacked_backward"
    ]


def test_qkvpacked_notices_a_projection_that_was_written_to() -> None:
    leaf = torch.randn(2, 9, 3 * 2 * 16, requires_grad=True)
    qkv = leaf * 1
    out = attention_qkvpacked(qkv, 2)
    qkv.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.randn(2, 5, 6, 8)}, r"qkv must have 3 dimensions .* got \(2, 5, 6, 8\)"),
        ({"n_head": 5}, r"H = n_head = 5 and H_kv = n_kv_head = 1, each at least 1; got \(2, 5, 48\)"),
        ({"n_head": 0}, "n_head = 0"),
        ({"n_kv_head": -1}, "n_kv_head = -1"),
        ({"n_head": 2, "n_kv_head": 3}, "heads of k and v must divide those of q, got 3 and 2"),
        ({"qkv": torch.randn(2, 5, 0)}, "head dim must not be 0"),
        ({"qkv": torch.ones(2, 5, 48).long()}, "must be float32, bfloat16, float16 or float64"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "packed sequences have batch 1"),
    ],
)
def test_qkvpacked_bad_input(change: dict, message: str) -> None:
    arguments = {"qkv": torch.randn(2, 5, 48), "n_head": 4, "n_kv_head": 1}
    with pytest.raises(ValueError, match=f"attention.*: .*{message}"):
        attention_qkvpacked(**{**arguments, **change})


def test_the_boundaries_of_packed_sequences_may_have_any_stride(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(batch=1, length=8, columns=8))
    boundaries = torch.tensor([[0, 7], [3, 7], [8, 7]], dtype=torch.int32)[:, 0]
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    results = []
    for cu_seqlens in (boundaries, boundaries.contiguous()):
        out = attention(q, k, v, cu_seqlens=cu_seqlens)
        results.append((out, *torch.autograd.grad(out, (q, k, v), upstream)))
    for strided, packed in zip(*results, strict=True):
        assert torch.equal(strided, packed)
