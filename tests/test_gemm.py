"""The GEMM alone (csrc/gemm), on the emulator or on a GPU: layouts, tails, alignment, tiles and split k."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.ops import gemm, native
from fastlm.ops.case import Case, all_cases
from tests.emulator import backend as emulator
from tests.op_suite import DTYPES, check, check_case


@pytest.fixture(params=["emulator", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(gemm, "library_is_faster", lambda a: False)
    reason = emulator.unavailable() if request.param == "emulator" else native.cuda_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with emulator.emulated() if request.param == "emulator" else nullcontext():
        yield "cpu" if request.param == "emulator" else "cuda"


@contextmanager
def multiprocessors(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[None]:
    """Inside, products are shared out as on a device of so many: more of them, and tiles are small or k is split."""
    with monkeypatch.context() as patch:
        patch.setattr(emulator, "MULTIPROCESSORS", count)
        patch.setattr(native, "multiprocessors", lambda index: count)
        yield


def matrix(rows: int, cols: int, layout: str, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """(rows, cols): "rows" contiguous, "columns" contiguous, "odd": rows not 16-byte aligned, "odd columns"."""
    generator = torch.Generator().manual_seed(seed)
    if "columns" in layout:
        rows, cols = cols, rows
    t = torch.randn(rows, cols + 3, generator=generator).to(device, dtype)
    t = t[:, 1 : cols + 1] if "odd" in layout else t[:, :cols].contiguous()
    return t.T if "columns" in layout else t


def textbook(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


LAYOUTS = [
    ("rows", "rows"),
    ("rows", "columns"),
    ("columns", "columns"),
    ("odd", "rows"),
    ("odd columns", "odd columns"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", [(136, 144, 40), (70, 200, 104), (5, 3, 7), (64, 64, 128)], ids=str)
def test_layouts_and_sizes(device: str, size: tuple, layouts: tuple, dtype: torch.dtype) -> None:
    m, n, k = size
    a = matrix(m, k, layouts[0], dtype, device, 1)
    b = matrix(n, k, layouts[1], dtype, device, 2)
    out = torch.full((m, n), float("nan"), dtype=dtype, device=device)
    gemm.product(a, b, out)
    check("c", out, a.double() @ b.double().T, textbook(a, b), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("size", [(40, 72, 700), (130, 136, 600), (1, 33, 515)], ids=str)
def test_split_k(device: str, size: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, k = size
    a, b = matrix(m, k, "rows", dtype, device, 1), matrix(n, k, "rows", dtype, device, 2)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    wanted, eager = a.double() @ b.double().T + bias.double(), torch.nn.functional.linear(a, b, bias)
    results = []
    for count in (1, 8, 16, 16):
        with multiprocessors(monkeypatch, count):
            results.append(gemm.product(a, b, torch.empty(m, n, dtype=dtype, device=device), bias=bias))
    for out in results:
        check("c", out, wanted, eager, dtype)
    assert torch.equal(results[2], results[3])
    assert dtype != torch.float32 or not torch.equal(results[0], results[3])  # it was split


def test_float32_over_a_long_k_is_float32(device: str) -> None:
    """Far below what single tf32 products would give, also where all of them are positive."""
    a = matrix(3, 4099, "odd", torch.float32, device, 1).abs()
    b = matrix(2, 4099, "rows", torch.float32, device, 2).abs()
    out = gemm.product(a, b, torch.empty(3, 2, device=device))
    wanted = a.double() @ b.double().T
    assert ((out.double() - wanted) / wanted).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_adds_to_a_float32_matrix_with_a_scale_and_a_stride(device: str, dtype: torch.dtype) -> None:
    a, b = matrix(19, 77, "columns", dtype, device, 1), matrix(21, 77, "columns", dtype, device, 2)
    room = torch.ones(19, 33, device=device)
    scale = torch.tensor(0.25, device=device)
    gemm.product(a, b, room[:, :21], scale=scale, accumulate=True)
    torch.testing.assert_close(room[:, :21].double(), 1 + 0.25 * (a.double() @ b.double().T), rtol=1e-5, atol=1e-5)
    assert (room[:, 21:] == 1).all()


def test_empty_sizes(device: str) -> None:
    empty = torch.empty(0, 8, device=device)
    assert gemm.product(empty, torch.ones(4, 8, device=device), torch.empty(0, 4, device=device)).shape == (0, 4)
    out = gemm.product(
        torch.ones(4, 8, device=device)[:, :0], torch.ones(3, 0, device=device), torch.full((4, 3), 7.0, device=device)
    )
    assert not out.any()


@pytest.mark.parametrize("library", [False, True])
def test_a_bad_call_is_refused(device: str, library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="out must be of the operands' type"):
        gemm.product(a, a, torch.empty(8, 8, dtype=torch.float16, device=device))
    monkeypatch.setattr(gemm, "library_is_faster", lambda a: library)
    with pytest.raises(ValueError, match="float32 where it is added to"):
        gemm.product(a, a, torch.empty_like(a), accumulate=True)


PRODUCTS = [c for c in all_cases() if c.op in ("linear_act", "mlp", "linear_cross_entropy") and "large" not in c.traits]


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_float32_products_of_the_library(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fused into products of ours is a pass of its own beside the library's, as on a GPU that is no A100."""
    monkeypatch.setattr(gemm, "library_is_faster", lambda a: True)
    check_case("emulator", case, torch.float32)


@pytest.mark.parametrize(
    ("capability", "tf32", "library"), [((8, 0), False, False), ((8, 0), True, True), ((9, 0), False, True)]
)
def test_who_makes_float32_products(
    capability: tuple[int, int],
    tf32: bool,
    library: bool,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(gemm, "_allows_tf32", lambda: tf32)
    gemm._is_sm80.cache_clear()
    request.addfinalizer(gemm._is_sm80.cache_clear)
    for dtype, wanted in ((torch.float32, library), (torch.bfloat16, True)):
        a: Any = SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))
        assert gemm.library_is_faster(a) == wanted
        assert gemm.library_makes_float32(a) == (wanted and dtype == torch.float32)
    assert not gemm.library_is_faster(torch.zeros(2, 2))


def test_tf32_is_allowed_by_torchs_setting() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, allowed in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(setting)
            assert gemm._allows_tf32() is allowed
    finally:
        torch.set_float32_matmul_precision(before)
