"""The backward of attention for Hopper (csrc/attention/backward_sm90.cu), on the emulator or on a GPU that has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops.attention.cases import eager_attention, slices
from tests.emulator import harness
from tests.emulator.hopper import device_of, sixteen_bit
from tests.op_suite import check, run, wide

THREADS = 384  # of its blocks; no other kernel of the backward has so many


@pytest.fixture(params=["emulator", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return device_of(request.param, monkeypatch)


@pytest.fixture
def launches(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often this kernel ran since it was last asked. On a GPU nothing counts launches: once each."""
    path = tmp_path / "counts"
    monkeypatch.setenv("FASTLM_EMULATOR_COUNTS", str(path))

    def count() -> int:
        if device == "cuda":
            return 1
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        return sum(json.loads(line)["threads"] == THREADS for line in text.splitlines())

    return count


def tensors(
    device: str,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    length: int = 100,
    columns: int | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    width: int = 64,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    columns, kv_heads = columns or length, kv_heads or heads
    shapes = {"q": (length, heads), "k": (columns, kv_heads), "v": (columns, kv_heads)}
    return {n: torch.randn(batch, *s, width, generator=generator).to(device, dtype) for n, s in shapes.items()}


class Backward:
    """The forward, and its backward as often as wanted."""

    def __init__(self, device: str, arguments: dict, return_lse: bool = False, layout: Callable = lambda t: t):
        self.arguments = {**arguments, "return_lse": return_lse}
        self.backend = "cuda" if device == "cuda" else "emulator"
        self.leaves = {k: arguments[k].detach().requires_grad_() for k in "qkv"}
        with fastlm.backend(self.backend):
            outputs = ops.attention(**{**self.arguments, **self.leaves})
        self.outputs = list(outputs) if return_lse else [outputs]
        generator = torch.Generator().manual_seed(1)
        self.upstream = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in self.outputs]
        self.upstream[0] = layout(self.upstream[0])

    def gradients(self) -> list[Tensor]:
        with fastlm.backend(self.backend):
            return list(torch.autograd.grad(self.outputs, list(self.leaves.values()), self.upstream, retain_graph=True))

    def check(self, got: list[Tensor]) -> None:
        dtype = got[0].dtype
        with fastlm.backend("reference"):
            _, wanted, _ = run(ops.attention, wide(self.arguments), self.upstream)
        _, textbook, _ = run(eager_attention, self.arguments, self.upstream)
        for name, g, w, t in zip("qkv", got, wanted, textbook, strict=True):
            check(f"d{name}", g, w, t, dtype)


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (37, 20)},
    "left": {"causal": True, "window": (5, 0)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("width", [8, 40, 64, 72, 128])
@sixteen_bit
def test_widths_and_masks(device: str, dtype: torch.dtype, width: int, mask: str, launches: Callable[[], int]) -> None:
    backward = Backward(device, {**tensors(device, dtype, length=141, width=width), **MASKS[mask]}, return_lse=True)
    launches()
    got = backward.gradients()
    assert launches() == 1
    backward.check(got)


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("size", [(1, 2), (1, 200), (200, 3), (65, 300), (300, 65), (256, 128), (129, 257)], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_lengths(device: str, width: int, size: tuple[int, int], mask: str, launches: Callable[[], int]) -> None:
    """With T < S, and with T > S, where rows see nothing under a mask; windows leave keys that nobody sees."""
    arguments = tensors(device, torch.bfloat16, length=size[0], columns=size[1], width=width)
    backward = Backward(device, {**arguments, **MASKS[mask]})
    launches()
    got = backward.gradients()
    assert launches() == 1
    backward.check(got)


@pytest.mark.parametrize("schedule", [("fifo", 0), ("lifo", 0), ("random", 1), ("random", 2)], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_the_order_of_threads_does_not_matter(
    device: str, width: int, schedule: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several batch entries and heads, several of q for one of k and v: more works than blocks of threads."""
    arguments = tensors(device, torch.bfloat16, batch=2, length=200, columns=300, heads=4, kv_heads=2, width=width)
    backward = Backward(device, {**arguments, "causal": True})
    found = backward.gradients()
    with harness.schedule(*schedule):
        for multiprocessors, resident in ((1, 1), (3, 2), (20, 64)):
            monkeypatch.setenv("FASTLM_EMULATOR_MULTIPROCESSORS", str(multiprocessors))
            monkeypatch.setenv("FASTLM_EMULATOR_RESIDENT", str(resident))
            for first, again in zip(found, backward.gradients(), strict=True):
                assert torch.equal(first, again), (schedule, multiprocessors, resident)
    backward.check(found)


@pytest.mark.parametrize("kv_heads", [1, 2])
@sixteen_bit
def test_strided_views(device: str, dtype: torch.dtype, kv_heads: int, launches: Callable[[], int]) -> None:
    """q, k and v of one tensor, a transposed one, and an upstream gradient with the heads before the rows."""
    heads, width = 4, 64
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 70, (heads + 2 * kv_heads) * width, generator=generator).to(device, dtype)
    q, k, v = whole.unflatten(2, (-1, width)).split((heads, kv_heads, kv_heads), 2)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    backward = Backward(
        device,
        {"q": q, "k": k, "v": v, "causal": True},
        layout=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    )
    launches()
    got = backward.gradients()
    assert launches() == 1
    backward.check(got)


@pytest.mark.parametrize("mask", ["causal", "window"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("width", [40, 64, 128])
@sixteen_bit
def test_a_packed_gradient(
    device: str, dtype: torch.dtype, width: int, kv_heads: int, mask: str, launches: Callable[[], int]
) -> None:
    """dq, dk and dv as slices of one tensor have the bits that they have alone."""
    heads, generator = 4, torch.Generator().manual_seed(0)
    whole = torch.randn(2, 150, (heads + 2 * kv_heads) * width, generator=generator).to(device, dtype)
    dout = torch.randn(2, 150, heads, width, generator=generator).to(device, dtype)
    with fastlm.backend("cuda" if device == "cuda" else "emulator"):
        out = ops.attention_qkvpacked(whole.requires_grad_(), heads, kv_heads, **MASKS[mask])
        launches()
        (packed,) = torch.autograd.grad(out, whole, dout)
        assert launches() == 1
        (wanted,) = torch.autograd.grad(ops.attention(*slices(whole, heads, kv_heads), **MASKS[mask]), whole, dout)
    assert torch.equal(packed, wanted)


def test_what_it_leaves_to_the_other_kernel(device: str, launches: Callable[[], int]) -> None:
    base = tensors(device, torch.bfloat16, length=40)
    ends = torch.tensor([0, 13, 40], dtype=torch.int32, device=device)
    others = [{"softcap": 3.0}, {"cu_seqlens": ends}, {"alibi_slopes": torch.ones(1, device=device)}, {"scale": -0.1}]
    for options in others:
        backward = Backward(device, {**base, **options})
        launches()
        got = backward.gradients()
        assert device == "cuda" or launches() == 0
        backward.check(got)
    backward = Backward(device, {**base, "causal": True}, layout=lambda t: t[:, :1].expand(t.shape))
    launches()
    got = backward.gradients()
    assert device == "cuda" or launches() == 0  # rows that lie over each other
    backward.check(got)


def test_large_scores_beyond_the_last_key(device: str) -> None:
    """A weight that is infinite where there is no key must not reach the sums."""
    arguments = tensors(device, torch.bfloat16, length=70, columns=70)
    arguments["q"], arguments["k"] = 1 + 0.1 * arguments["q"], 0.1 * arguments["k"] - 20  # scores about -160
    backward = Backward(device, arguments)
    got = backward.gradients()
    assert all(g.isfinite().all() for g in got)
    backward.check(got)


def test_nan_of_another_batch_entry_stays_there(device: str) -> None:
    arguments = tensors(device, torch.bfloat16, batch=2, length=70, columns=90)
    arguments["k"][0], arguments["v"][0] = torch.nan, torch.nan
    got = Backward(device, arguments).gradients()
    assert all(g[1].isfinite().all() for g in got)
    assert all(g[0].isnan().any() for g in got)
