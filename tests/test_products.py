"""Products on the CPU: those of half precision that are made in float32, and our own kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.nn.linear import linear
from fastlm.ops import memory, mkl, native, products

if native.cpu_unavailable() is not None:
    pytest.skip(str(native.cpu_unavailable()), allow_module_level=True)

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def widen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without such instructions, and with a fast library, whatever this one has."""
    monkeypatch.setattr(products, "widens", lambda dtype: dtype in HALF)
    monkeypatch.setattr(products, "library_lags", lambda: False)


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str = "rows") -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    values = torch.randn(rows, columns, generator=generator).to(dtype)
    if layout == "columns":
        return values.t().contiguous().t()
    return values if layout == "rows" else torch.stack((values, values), -1)[..., 0]  # "gaps": no side is contiguous


@pytest.mark.parametrize("piece", [1 << 10, 16 << 20], ids=["pieces", "whole"])
@pytest.mark.parametrize("layouts", list(itertools.product(["rows", "columns", "gaps"], repeat=2)), ids="-".join)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_the_product_is_rounded_once(
    layouts: tuple[str, str], out_dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "PIECE_BYTES", piece)
    a, b = matrix(267, 45, torch.bfloat16, layouts[0]), matrix(45, 83, torch.bfloat16, layouts[1])
    bias = matrix(1, 83, torch.bfloat16)[0]
    out = torch.full((267, 83), float("nan"), dtype=out_dtype)
    products.mm(a, b, out, bias)
    exact = a.double() @ b.double() + bias.double()
    sums = 1e-6 * (a.double().abs() @ b.double().abs() + bias.double().abs())  # the order of float32's additions
    unit = torch.finfo(out_dtype).eps / 2
    assert ((out.double() - exact).abs() <= sums + unit * (exact.abs() + sums)).all()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("piece", [1 << 10, 16 << 20], ids=["pieces", "whole"])
def test_a_mixed_product_is_added(
    dtypes: tuple[torch.dtype, torch.dtype], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "PIECE_BYTES", piece)
    a, b, start = matrix(33, 70, dtypes[0]), matrix(70, 41, dtypes[1]), matrix(33, 41, torch.float32)
    out = start.clone()
    products.mm(a, b, out, accumulate=True)
    torch.testing.assert_close(out.double(), start.double() + a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [(0, 9, 9), (9, 0, 9), (9, 9, 0)])
def test_sizes_of_zero(sizes: tuple[int, int, int]) -> None:
    m, k, n = sizes
    a, b, bias = torch.zeros(m, k), torch.zeros(k, n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16)
    out = torch.full((m, n), 7.0)
    products.mm(a, b, out, accumulate=True)
    assert (out == 7).all()
    products.mm(a, b, out, bias)
    assert (out == 1).all()
    products.mm(a, b, out)
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_infinite_and_large_numbers_stay(dtype: torch.dtype) -> None:
    a, b = torch.eye(16, dtype=dtype), matrix(16, 16, dtype)
    b[3, 4], b[5, 6], b[7, 8] = float("inf"), torch.finfo(dtype).max, float("nan")
    out = torch.empty(16, 16, dtype=dtype)
    products.mm(a[[5]].expand(16, 16), b, out)  # the row with the largest number
    assert (out[:, 6] == torch.finfo(dtype).max).all()
    products.mm(a, b, out)
    assert out[3, 4] == float("inf") and out[:, 8].isnan().all()


def test_the_memory_beside_the_operands_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head's weights are never in float32 as a whole."""
    monkeypatch.setattr(products, "PIECE_BYTES", 1 << 20)
    taken: list[int] = []
    empty = memory.empty

    def counted(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        t = empty(shape, dtype)
        taken.append(t.nbytes)
        return t

    monkeypatch.setattr(memory, "empty", counted)
    x, weight = matrix(264, 256, torch.bfloat16), matrix(20_000, 256, torch.bfloat16)
    logits = torch.empty(264, 20_000, dtype=torch.bfloat16)
    products.mm(x, weight.t(), logits)
    products.mm(logits, weight, torch.empty(264, 256))
    products.mm(logits.t(), x, torch.empty(20_000, 256, dtype=torch.bfloat16))
    assert taken and max(taken) <= 1 << 20


@pytest.mark.parametrize("autocast", [False, True])
def test_small_layers_in_training_go_this_way(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(products, "_widened", lambda a, b, out, *_: calls.append(tuple(out.shape)))
    dtype = torch.float32 if autocast else torch.bfloat16
    rows = products.NARROW_ROWS + 20
    x, weight = torch.randn(rows, 12, dtype=dtype), torch.randn(14, 12, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", enabled=autocast):
        y = linear(x, weight)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert calls == [(rows, 14), (14, 12)]  # the output and the weight's gradient


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_loss_keeps_its_logits_in_float32(dtype: torch.dtype) -> None:
    x, weight = matrix(40, 32, dtype), matrix(300, 32, dtype)
    targets = torch.arange(40)
    with fastlm.backend("cpu"):
        loss = fastlm.ops.linear_cross_entropy(x, weight, targets)
    exact = torch.nn.functional.cross_entropy(x.double() @ weight.double().t(), targets)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


def wanted(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x @ weight.T + bias, and what an element may be off: float32's additions, and one rounding."""
    exact, magnitude = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    sums = 1e-6 * magnitude
    return exact, sums + torch.finfo(out_dtype).eps / 2 * (exact.abs() + sums)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("types", [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (F32, BF16, F32)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (17, 5, 3), (33, 400, 29), (64, 1024, 130), (300, 385, 49)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "apart"])
def test_narrow_products(sizes: tuple[int, int, int], types: tuple[torch.dtype, ...], layout: str) -> None:
    """Any sizes, with rows that lie side by side or further apart than they are long."""
    rows, depth, cols = sizes
    gap = 3 if layout == "apart" else 0
    x, weight = matrix(rows, depth + gap, types[0])[:, :depth], matrix(cols, depth + gap, types[1])[:, :depth]
    around = torch.full((rows, cols + gap), 7.0, dtype=types[2])
    for bias in (None, matrix(1, cols, types[1])[0]):
        products.narrow(x, weight, bias, around[:, :cols])
        exact, bound = wanted(x, weight, bias, types[2])
        assert ((around[:, :cols].double() - exact).abs() <= bound).all()
        assert (around[:, cols:] == 7).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_row_of_a_narrow_product_is_the_same_whatever_the_others_are(dtype: torch.dtype) -> None:
    x, weight = matrix(300, 800, dtype), matrix(61, 800, dtype)
    together, some = torch.empty(300, 61, dtype=dtype), torch.empty(20, 61, dtype=dtype)
    products.narrow(x, weight, None, together)
    products.narrow(x[137:157], weight, None, some)
    assert torch.equal(together[137:157], some)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_few_rows_and_a_layers_weights_are_our_own_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours: list[int] = []
    for name in ("skinny", "narrow"):
        kernel = getattr(products, name)
        monkeypatch.setattr(products, name, lambda x, *rest, kernel=kernel: (ours.append(len(x)), kernel(x, *rest))[1])
    monkeypatch.setattr(products, "_has_wide_registers", lambda: True)
    weight, bias = matrix(1100, 512, dtype), matrix(1, 1100, dtype)[0]
    for rows in (3, 16, 17, 256, 257):
        x = matrix(rows, 512, dtype)
        exact, bound = wanted(x, weight, bias, dtype)
        y = products.linear(x, weight, bias)
        assert ((y.double() - exact).abs() <= bound).all()
    assert ours == [3, 16, 17, 256]
    dx = torch.empty(20, 512, dtype=dtype)
    products.mm(matrix(20, 1100, dtype), weight, dx)  # by the weights as they are, not transposed
    products.mm(matrix(20, 512, dtype), weight.t(), torch.zeros(20, 1100), accumulate=True)
    assert ours == [3, 16, 17, 256]


@pytest.mark.parametrize(
    "types", [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F32), (F32, BF16, F32), (BF16, F32, F16)], ids=str
)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (5, 7, 3), (13, 193, 17), (48, 192, 512), (600, 400, 33), (49, 385, 560)], ids=str
)
@pytest.mark.parametrize("layouts", list(itertools.product(["rows", "columns"], repeat=2)), ids="-".join)
def test_packed_products(sizes: tuple[int, int, int], types: tuple[torch.dtype, ...], layouts: tuple[str, str]) -> None:
    """Any sizes, either operand a transpose, the result's rows further apart than they are long."""
    rows, depth, cols = sizes
    a, b = matrix(rows, depth, types[0], layouts[0]), matrix(depth, cols, types[1], layouts[1])
    around = torch.full((rows, cols + 3), 7.0, dtype=types[2])
    for bias in (None, matrix(1, cols, types[1])[0]):
        products.packed(a, b, around[:, :cols], bias)
        exact, bound = wanted(a, b.t(), bias, types[2])
        assert ((around[:, :cols].double() - exact).abs() <= bound).all()
        assert (around[:, cols:] == 7).all()
    if types[2] == F32:
        start = matrix(rows, cols, F32)
        around[:, :cols] = start
        products.packed(a, b, around[:, :cols], accumulate=True)
        exact, bound = wanted(a, b.t(), None, F32)
        bound += 1e-6 * start.double().abs()
        assert ((around[:, :cols].double() - exact - start.double()).abs() <= bound).all()
        assert (around[:, cols:] == 7).all()


@pytest.mark.parametrize("layouts", list(itertools.product(["rows", "columns"], repeat=2)), ids="-".join)
def test_a_row_of_a_packed_product_is_the_same_whatever_else_there_is(
    layouts: tuple[str, str],
) -> None:
    a, b = matrix(700, 450, F32, layouts[0]), matrix(450, 601, F32, layouts[1])
    together, threads = torch.empty(700, 601), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            out = torch.empty(700, 601)
            products.packed(a, b, out)
            if count == 1:
                together.copy_(out)
            assert torch.equal(out, together)
    finally:
        torch.set_num_threads(threads)
    some = torch.empty(20, 601)
    products.packed(a[137:157], b, some)
    assert torch.equal(together[137:157], some)


def test_infinite_numbers_of_a_packed_product_stay_where_they_are() -> None:
    """What is multiplied beside the result's edges goes nowhere."""
    a, b = torch.ones(50, 200), torch.ones(200, 70)
    a[49, 3], b[199, 69] = float("nan"), float("inf")
    out = torch.empty(50, 70)
    products.packed(a, b, out)
    assert out[49].isnan().all() and (out[:49, 69] == float("inf")).all() and (out[:49, :69] == 200).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("depth", [200, 201])
@pytest.mark.parametrize("turned", list(itertools.product([False, True], repeat=2)), ids=str)
def test_a_packed_product_reads_nothing_beside_its_operands(
    dtype: torch.dtype, depth: int, turned: tuple[bool, bool]
) -> None:
    """The number that a pair at an odd depth's end would have with it, the columns past a panel's end."""
    a, b = (
        torch.full((51, depth + 1), float("nan"), dtype=dtype),
        torch.full((depth + 1, 36), float("nan"), dtype=dtype),
    )
    a, b = (t.t().contiguous().t() if turn else t for t, turn in zip((a, b), turned, strict=True))
    a, b = a[:50, :depth].fill_(1), b[:depth, :35].fill_(1)
    out = torch.empty(50, 35)
    products.packed(a, b, out)
    assert (out == depth).all()


def test_large_products_are_our_own_where_the_library_lags(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: list[tuple[int, ...]] = []
    kernel = products.packed
    monkeypatch.setattr(products, "packed", lambda a, b, out, *rest: (ours.append(out.shape), kernel(a, b, out, *rest)))
    monkeypatch.setattr(products, "library_lags", lambda: True)
    x, weight = matrix(512, 256, F32).requires_grad_(), matrix(160, 256, F32).requires_grad_()
    with fastlm.backend("cpu"):
        linear(x, weight).backward(torch.ones(512, 160))
    assert ours == [(512, 160), (512, 256), (160, 256)]
    assert x.grad is not None and weight.grad is not None
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand_as(x))
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand_as(weight))
    ours.clear()
    total = torch.zeros(160, 256)
    products.mm(torch.ones(160, 512), x.detach(), total, accumulate=True)
    products.mm(torch.ones(160, 512, dtype=BF16), x.detach(), total, accumulate=True)
    assert ours == [(160, 256)] * 2
    torch.testing.assert_close(total, 2 * x.detach().sum(0).expand_as(total), rtol=0, atol=1e-4)
    ours.clear()
    products.mm(matrix(512, 256, F32, "gaps"), weight.detach().t(), torch.empty(512, 160))
    products.mm(torch.ones(512, 4096), torch.ones(4096, 8), torch.empty(512, 8))
    products.mm(torch.ones(300, 40), torch.ones(40, 50), torch.empty(300, 50))
    products.mm(torch.ones(300, 40, dtype=BF16), torch.ones(40, 50, dtype=BF16), torch.empty(300, 50))  # in float32
    assert ours == []
    monkeypatch.setattr(products, "widens", lambda dtype: dtype == F16)
    products.mm(torch.ones(300, 40, dtype=BF16), torch.ones(40, 50, dtype=BF16), torch.empty(300, 50))  # by pairs
    assert ours == [(300, 50)]


def test_float64_layers_stay_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They can be differentiated twice."""
    monkeypatch.setattr(products, "library_lags", lambda: True)
    x, weight = matrix(512, 512, torch.float64).requires_grad_(), matrix(300, 512, torch.float64).requires_grad_()
    assert linear(x, weight).grad_fn.name().removesuffix("0") in ("MmBackward", "AddmmBackward")  # type: ignore[union-attr]


@pytest.mark.parametrize(("vendor", "lags"), [("GenuineIntel", False), ("AuthenticAMD", True), ("", False)])
def test_the_library_lags_on_amds_processors_alone(vendor: str, lags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(products, "_has_wide_registers", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(mkl, "processor", lambda: vendor)
    assert products.library_lags.__wrapped__() is lags
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not products.library_lags.__wrapped__()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_beside_a_float32_result_of_halves(dtype: torch.dtype) -> None:
    """Few rows and columns, where no kernel of ours is in the way."""
    a, b, bias = matrix(20, 5, dtype), matrix(5, 31, dtype), matrix(1, 31, dtype)[0]
    out = torch.empty(20, 31)
    products.mm(a, b, out, bias)
    torch.testing.assert_close(out, a.float() @ b.float() + bias.float(), rtol=1e-2, atol=1e-2)
