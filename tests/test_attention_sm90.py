"""Attention for Hopper (csrc/attention/forward_sm90.cu), on the emulator or on a GPU of compute capability 9.0."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops.attention.cases import CASES, eager_attention
from fastlm.ops.case import Case
from tests.emulator.hopper import device_of, sixteen_bit
from tests.op_suite import check, check_case, wide


@pytest.fixture(params=["emulator", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    place = device_of(request.param, monkeypatch)
    with fastlm.backend(request.param):
        yield place


class Attention:
    """Runs attention and compares it with float64; counts the launches of the emulator."""

    def __init__(self, device: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.device, self.counts, self.monkeypatch = device, folder / "counts", monkeypatch

    def randn(self, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    def run(self, arguments: dict, threads: int | None = None) -> tuple[Tensor, Tensor]:
        """threads: of a block of this kernel's; None: of the other kernel's. A GPU does not say."""
        self.monkeypatch.setenv("FASTLM_EMULATOR_COUNTS", str(self.counts))
        with torch.no_grad():
            out, lse = ops.attention(**arguments, return_lse=True)
        self.monkeypatch.delenv("FASTLM_EMULATOR_COUNTS")
        if self.device == "cpu":
            launches = [json.loads(line)["threads"] for line in self.counts.read_text().splitlines()]
            assert launches == [threads or 128]
            self.counts.unlink()
        return out, lse

    def check(self, arguments: dict, threads: int | None = None) -> tuple[Tensor, Tensor]:
        found = self.run(arguments, threads)
        with fastlm.backend("reference"), torch.no_grad():
            wanted = ops.attention(**wide(arguments), return_lse=True)
        textbook = eager_attention(**arguments, return_lse=True)
        for name, got, want, text in zip(("out", "lse"), found, wanted, textbook, strict=True):
            check(name, got, want, text, arguments["q"].dtype)
        return found


@pytest.fixture
def attention(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attention:
    return Attention(device, tmp_path, monkeypatch)


def threads_of(width: int) -> int:
    return 512 if width <= 64 else 384


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (70, 30)},
    "narrow": {"window": (3, 0)},
    "right": {"window": (None, 40)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", [(1, 1), (130, 130), (200, 333), (333, 150), (16, 600), (389, 389)], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_masks_and_lengths(attention: Attention, width: int, size: tuple[int, int], mask: str) -> None:
    """Also rows that see nothing: zeros, and a lse of -inf."""
    rows, columns = size
    q = attention.randn(1, rows, 1, width, dtype=torch.bfloat16, seed=1)
    k, v = (attention.randn(1, columns, 1, width, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    attention.check({"q": q, "k": k, "v": v, **MASKS[mask]}, threads_of(width))


@pytest.mark.parametrize("width", [8, 40, 72, 120])
@sixteen_bit
def test_narrower_heads_and_views_of_a_packed_projection(attention: Attention, dtype: torch.dtype, width: int) -> None:
    """Several heads and batch entries, so that the blocks go round."""
    q, k, v = attention.randn(2, 210, 3, 3, width, dtype=dtype, seed=1).unbind(2)
    attention.check({"q": q, "k": k, "v": v, "causal": True, "scale": 0.3}, threads_of(width))


@pytest.mark.parametrize("width", [64, 128])
@sixteen_bit
def test_shared_heads_of_keys(attention: Attention, dtype: torch.dtype, width: int) -> None:
    q = attention.randn(2, 6, 140, width, dtype=dtype, seed=1).transpose(1, 2)
    k, v = (attention.randn(2, 2, 270, width, dtype=dtype, seed=seed).transpose(1, 2) for seed in (2, 3))
    attention.check({"q": q, "k": k, "v": v, "causal": True}, threads_of(width))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_packed_sequences(attention: Attention, width: int, mask: str) -> None:
    ends = torch.tensor([0, 0, 1, 140, 145, 145, 420], dtype=torch.int32, device=attention.device)
    q, k, v = (attention.randn(1, 420, 2, width, dtype=torch.bfloat16, seed=seed) for seed in (1, 2, 3))
    attention.check({"q": q, "k": k, "v": v, "cu_seqlens": ends, **MASKS[mask]}, threads_of(width))


@pytest.mark.parametrize("width", [64, 128])
def test_nan_of_another_sequence_is_not_seen(attention: Attention, width: int) -> None:
    """Not even as 0 * NaN, from a tile that has keys of two sequences."""
    ends = torch.tensor([0, 75, 300], dtype=torch.int32, device=attention.device)
    q, k, v = (attention.randn(1, 300, 1, width, dtype=torch.bfloat16, seed=seed) for seed in (1, 2, 3))
    k[:, 75:], v[:, 75:] = torch.nan, torch.nan
    out, lse = attention.run({"q": q, "k": k, "v": v, "cu_seqlens": ends}, threads_of(width))
    assert out[:, :75].isfinite().all() and lse[..., :75].isfinite().all()
    assert out[:, 75:].isnan().all() and lse[..., 75:].isnan().all()


@pytest.mark.parametrize("width", [64, 128])
def test_scores_that_rise_and_fall(attention: Attention, width: int) -> None:
    """Maxima that grow from tile to tile, by little and by much, and scores of hundreds."""
    columns = 700
    q = attention.randn(1, 200, 1, width, dtype=torch.bfloat16, seed=1)
    k, v = (attention.randn(1, columns, 1, width, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    for steps in ([9.0, 5.0, 0.1, 3.0, 1.0, 2.0], [0.1, 0.3, 1.0, 1.2, 1.5, 0.2]):
        factors = torch.tensor(steps, device=attention.device).repeat_interleave(128)[:columns]
        scaled = k * factors[None, :, None, None].bfloat16()
        attention.check({"q": q, "k": scaled, "v": v, "scale": 1.0}, threads_of(width))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_the_order_of_threads_does_not_matter(
    attention: Attention, width: int, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the number of blocks: the same bits."""
    q = attention.randn(2, 450, 2, width, dtype=torch.bfloat16, seed=1)
    k, v = (attention.randn(2, 520, 1, width, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    arguments = {"q": q, "k": k, "v": v, **MASKS[mask]}
    first = attention.check(arguments, threads_of(width))
    orders = [("lifo", 0, 1), ("random", 1, 3), ("random", 2, 5), ("random", 3, 2)]
    for schedule, seed, blocks in orders[:1] if attention.device == "cuda" else orders:
        monkeypatch.setenv("FASTLM_EMULATOR_SCHEDULE", schedule)
        monkeypatch.setenv("FASTLM_EMULATOR_SEED", str(seed))
        monkeypatch.setenv("FASTLM_EMULATOR_MULTIPROCESSORS", str(blocks))
        for a, b in zip(first, attention.run(arguments, threads_of(width)), strict=True):
            assert torch.equal(a, b), (schedule, seed)


def test_what_the_kernel_does_not_take(attention: Attention) -> None:
    """Softcap, wide heads, and rows that lie over each other are left to the other one."""
    q, k, v = (attention.randn(1, 40, 2, 64, dtype=torch.bfloat16, seed=seed) for seed in (1, 2, 3))
    attention.check({"q": q, "k": k, "v": v, "softcap": 5.0})
    attention.check({"q": q, "k": k[:, :, :1].expand(1, 40, 2, 64), "v": v})
    q, k, v = (attention.randn(1, 20, 1, 136, dtype=torch.bfloat16, seed=seed) for seed in (1, 2, 3))
    attention.check({"q": q, "k": k, "v": v})


@pytest.mark.parametrize("case", [c for c in CASES if not c.bench and "large" not in c.traits], ids=lambda c: c.name)
def test_the_cases_of_attention(device: str, case: Case) -> None:
    """Whichever kernel takes them, and the backward from what this one leaves."""
    check_case("emulator" if device == "cpu" else "cuda", case, torch.bfloat16)
