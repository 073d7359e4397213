"""The GEMM for Hopper (csrc/gemm/gemm_kernel_sm90.h), on the emulator or on a GPU of compute capability 9.0."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from fastlm.ops import gemm
from fastlm.ops.linear_cross_entropy.cases import _case as _loss
from fastlm.ops.mlp import reference
from fastlm.ops.mlp.cases import _mlp
from fastlm.ops.mlp.native import CODE
from fastlm.ops.mlp.reference import ACTIVATIONS, GATED
from tests.emulator import backend as emulator
from tests.emulator.hopper import device_of, sixteen_bit
from tests.op_suite import check, check_case
from tests.test_gemm import matrix, textbook

THREADS = 384  # of its blocks; no other product has so many


@pytest.fixture(params=["emulator", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    place = device_of(request.param, monkeypatch)
    monkeypatch.setattr(gemm, "library_is_faster", lambda a: False)
    with emulator.emulated() if place == "cpu" else nullcontext():
        yield place


@contextmanager
def launches(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """After it: what the emulator says of each launch inside. On a GPU nothing counts launches."""
    found: list[dict] = []
    path = tmp_path / "counts"
    with monkeypatch.context() as patch:
        patch.setenv("FASTLM_EMULATOR_COUNTS", str(path))
        yield found
    if device == "cpu":
        found += [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def products(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """After it: for each launch of a product inside whether it was this kernel's."""
    by_wgmma: list[bool] = []
    with launches(device, tmp_path, monkeypatch) as found:
        yield by_wgmma
    by_wgmma += [launch["threads"] == THREADS for launch in found]


@pytest.mark.parametrize("schedule", ["fifo", "lifo", "random"])
@pytest.mark.parametrize("sms", [2, 5])
@pytest.mark.parametrize("layouts", [("rows", "rows"), ("rows", "columns"), ("columns", "columns")], ids="-".join)
@pytest.mark.parametrize("size", [(256, 192, 64), (264, 392, 72), (520, 400, 136), (384, 256, 712)], ids=str)
@sixteen_bit
def test_layouts_and_sizes(
    device: str,
    dtype: torch.dtype,
    size: tuple,
    layouts: tuple,
    sms: int,
    schedule: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m, n, k = size
    monkeypatch.setattr(emulator, "MULTIPROCESSORS", sms)
    monkeypatch.setenv("FASTLM_EMULATOR_SCHEDULE", schedule)
    a = matrix(m, k, layouts[0], dtype, device, 1)
    b = matrix(n, k, layouts[1], dtype, device, 2)
    out = torch.full((m, n), float("nan"), dtype=dtype, device=device)
    with products(device, tmp_path, monkeypatch) as by_wgmma:
        gemm.product(a, b, out)
    check("c", out, a.double() @ b.double().T, textbook(a, b), dtype)
    assert by_wgmma == [True] * len(by_wgmma)


@pytest.mark.parametrize("n", [136, 384])
@sixteen_bit
def test_split_k(device: str, dtype: torch.dtype, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = matrix(130, 8192 + 72, "rows", dtype, device, 1), matrix(n, 8192 + 72, "rows", dtype, device, 2)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    results = []
    for sms in (2, 16, 16):
        monkeypatch.setattr(emulator, "MULTIPROCESSORS", sms)
        with products(device, tmp_path, monkeypatch) as by_wgmma:
            results.append(gemm.product(a, b, torch.empty(130, n, dtype=dtype, device=device), bias=bias))
        assert device == "cuda" or by_wgmma[-2:] == ([False, True] if sms == 2 else [True, False])[-len(by_wgmma) :]
    for out in results:
        check("c", out, a.double() @ b.double().T + bias.double(), torch.nn.functional.linear(a, b, bias), dtype)
    assert torch.equal(results[1], results[2])


def test_adds_to_a_float32_matrix_with_a_scale(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (matrix(136, 136, "columns", torch.bfloat16, device, seed) for seed in (1, 2))
    out, scale = torch.ones(136, 200, device=device), torch.tensor(0.25, device=device)
    with products(device, tmp_path, monkeypatch) as by_wgmma:
        gemm.product(a, b, out[:, :136], scale=scale, accumulate=True)
    wanted = 1 + 0.25 * (a.double() @ b.double().T)
    torch.testing.assert_close(out[:, :136].double(), wanted, rtol=1e-5, atol=1e-5)
    assert (out[:, 136:] == 1).all()
    assert by_wgmma == [True] * len(by_wgmma)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@sixteen_bit
def test_the_mlp(
    device: str, dtype: torch.dtype, activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epilogue, forward and backward, with rows and columns that no tile divides."""
    case = _mlp(activation, (264, 136), 144, activation=activation)
    with products(device, tmp_path, monkeypatch) as by_wgmma:
        check_case("emulator" if device == "cpu" else "cuda", case, dtype)
    assert device == "cuda" or by_wgmma.count(True) == 2 * 6  # the products, twice


def check_activations(
    device: str,
    dtype: torch.dtype,
    activation: str,
    size: tuple[int, int, int],
    layouts: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[int]:
    """Both epilogues, with and without what is optional. On the emulator, how many columns the tiles of each cover."""
    m, cols, k = size
    code, width = CODE[activation], cols * (2 if activation in GATED else 1)
    x, weight = matrix(m, k, "rows", dtype, device, 1), matrix(width, k, layouts[0], dtype, device, 2) * k**-0.5
    up = matrix(cols, k, layouts[1], dtype, device, 3) * k**-0.5
    bias = matrix(1, width, "rows", dtype, device, 4)[0]
    hidden, again = (torch.full((m, cols), float("nan"), dtype=dtype, device=device) for _ in range(2))
    pre, dpre = (torch.full((m, width), float("nan"), dtype=dtype, device=device) for _ in range(2))
    dbias = torch.full((width,), float("nan"), dtype=dtype, device=device)
    with launches(device, tmp_path, monkeypatch) as found:
        gemm.activate(x, weight, bias, code, hidden, pre)
        gemm.activate_backward(x, up, pre, code, dpre, again, dbias)
    assert torch.equal(hidden, again)
    check("pre", pre, x.double() @ weight.double().T + bias.double(), textbook(x, weight) + bias, dtype)
    check("hidden", hidden, reference.activate(pre.double(), activation), reference.activate(pre, activation), dtype)
    wanted = reference.activate_backward(x.double() @ up.double().T, pre.double(), activation)
    eager = reference.activate_backward(textbook(x, up), pre, activation)
    check("dpre", dpre, wanted, eager, dtype)
    check("dbias", dbias, wanted.sum(0), eager.sum(0), dtype)
    for keep in ((None, dbias), (again, None), (None, None)):
        other, sums = torch.empty_like(dpre), dbias.clone()
        gemm.activate_backward(x, up, pre, code, other, *keep)
        assert torch.equal(other, dpre) and torch.equal(sums, dbias) and torch.equal(hidden, again)
    assert torch.equal(gemm.activate(x, weight, bias, code, torch.empty_like(hidden)), hidden)
    gemm.activate(x, weight, None, code, hidden, pre)
    check("pre without a bias", pre, x.double() @ weight.double().T, textbook(x, weight), dtype)
    assert torch.equal(hidden, gemm.activate(x, weight, torch.zeros_like(bias), code, torch.empty_like(hidden)))
    # In 8 x 8 matrices pre and hidden pass shared memory on their way out; then pre on its way in, dpre and hidden out.
    rows, passing = (m + 255) // 256 * 256, (width + cols, 2 * width + cols)
    own = [launch["matrices"] * 64 for launch in found if launch["threads"] == THREADS]
    return [elements * cols // (rows * columns) for elements, columns in zip(own, passing, strict=device == "cpu")]


@pytest.mark.parametrize("schedule", ["fifo", "lifo", "random"])
@pytest.mark.parametrize("k", [64, 456])
@pytest.mark.parametrize(
    "activation, cols, covered",
    [("gelu_tanh", 456, 4 * 128), ("gelu_tanh", 520, 3 * 192), ("swiglu", 456, 4 * 128)],
)
def test_activations_in_many_turns(
    device: str,
    activation: str,
    cols: int,
    covered: int,
    k: int,
    schedule: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both warpgroups reuse their memory for pre, dpre and hidden; short products leave them finishing side by side."""
    monkeypatch.setenv("FASTLM_EMULATOR_SCHEDULE", schedule)
    size, layouts = (648, cols, k), ("rows", "columns")
    found = check_activations(device, torch.bfloat16, activation, size, layouts, tmp_path, monkeypatch)
    assert device == "cuda" or found == [covered, covered]


@pytest.mark.parametrize("cols, sms", [(136, 2), (184, 2), (520, 2), (400, 10)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@sixteen_bit
def test_activations_in_wide_tiles(
    device: str,
    dtype: torch.dtype,
    layout: str,
    cols: int,
    sms: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles of 192 columns whose last columns are beyond the result, or even the last 128."""
    monkeypatch.setattr(emulator, "MULTIPROCESSORS", sms)
    found = check_activations(device, dtype, "gelu", (648, cols, 136), (layout, layout), tmp_path, monkeypatch)
    covered = (cols + 191) // 192 * 192
    assert device == "cuda" or found == [covered, covered]


def test_the_loss_of_a_language_model(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, dx with its scale, and dweight, which is added up in float32."""
    case = _loss("", (264, 136), 392)
    with products(device, tmp_path, monkeypatch) as by_wgmma:
        check_case("emulator" if device == "cpu" else "cuda", case, torch.bfloat16)
    assert device == "cuda" or by_wgmma.count(True) == 2 * 3  # the products, twice


def test_what_tma_cannot_read_is_left_to_the_other_kernel(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows at odd addresses, equal rows that lie over each other, and a result with odd columns."""
    b = matrix(136, 72, "rows", torch.bfloat16, device, 2)
    odd = matrix(136, 72, "odd", torch.bfloat16, device, 1)
    for a, columns in ((odd, 136), (b[:1].expand(136, 72), 136), (b, 135)):
        with products(device, tmp_path, monkeypatch) as by_wgmma:
            out = gemm.product(a, b[:columns], torch.empty(136, columns, dtype=torch.bfloat16, device=device))
        check("c", out, a.double() @ b[:columns].double().T, textbook(a, b[:columns]), torch.bfloat16)
        assert not any(by_wgmma)
        (tmp_path / "counts").unlink(missing_ok=True)
