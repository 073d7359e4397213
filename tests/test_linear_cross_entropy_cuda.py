"""The CUDA backend of linear_cross_entropy, emulated or on a GPU: blocks of rows, both kinds of products, targets."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import fastlm
from fastlm.ops import gemm, linear_cross_entropy, native
from fastlm.ops.case import Maker
from fastlm.ops.linear_cross_entropy import cuda, reference
from fastlm.ops.linear_cross_entropy.cases import eager_linear_cross_entropy
from tests.emulator import backend as emulator
from tests.op_suite import check, run, wide

OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}


@pytest.fixture(params=["emulator", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = emulator.unavailable() if request.param == "emulator" else native.cuda_unavailable()
    if reason is not None:
        pytest.skip(reason)
    return request.param


def arguments(backend: str, dtype: torch.dtype, rows: int = 70, width: int = 24, vocab: int = 77) -> dict[str, Any]:
    make = Maker(dtype, "cuda" if backend == "cuda" else "cpu")
    targets = make.integers(0, vocab, rows)
    targets[::5] = -100
    return {"x": make.randn(rows, width), "weight": make.randn(vocab, width), "targets": targets}


def judge(backend: str, call: dict[str, Any], dtype: torch.dtype) -> None:
    with fastlm.backend(backend):
        outputs, gradients, upstream = run(linear_cross_entropy, call)
    with fastlm.backend("reference"):
        wanted, wanted_gradients, _ = run(linear_cross_entropy, wide(call), upstream)
    textbook, textbook_gradients, _ = run(eager_linear_cross_entropy, call, upstream)
    got, best, eager = (
        [*outputs, *gradients],
        [*wanted, *wanted_gradients],
        [*textbook, *textbook_gradients],
    )
    for name, g, w, t in zip(["loss", "dx", "dweight"], got, best, eager, strict=True):
        check(name, g, w, t, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("library", [False, True])
def test_many_blocks(
    backend: str, library: bool, dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "library_is_faster", lambda a: library)
    call = {**arguments(backend, dtype), **OPTIONS, "reduction": reduction}
    blocks = []
    make_logits = cuda._Work._logits
    monkeypatch.setattr(cuda._Work, "_logits", lambda *a: blocks.append(a[1]) or make_logits(*a))
    monkeypatch.setattr(cuda, "BLOCK_BYTES", 16 * 128 * dtype.itemsize)
    judge(backend, call, dtype)
    passes = 2 if reduction == "none" else 1  # "none" makes the logits again for the gradient
    assert [b.stop - b.start for b in blocks] == [16, 16, 16, 16, 6] * passes


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_products_by_the_library(backend: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does in half precision, and what it does in float32."""
    call = {**arguments(backend, torch.bfloat16), "reduction": reduction}
    for library in (True, False):
        monkeypatch.setattr(gemm, "library_is_faster", lambda a, library=library: library)
        judge(backend, call, torch.bfloat16)


@pytest.mark.parametrize("options", [{}, OPTIONS, {"label_smoothing": 0.1}], ids=["plain", "all", "smoothing"])
@pytest.mark.parametrize("vocab", [3, 4101, 17000, 30001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_of_any_width(backend: str, dtype: torch.dtype, vocab: int, options: dict[str, Any]) -> None:
    """In one part or several, with and without room in shared memory for two (30001 float32 have none)."""
    judge(backend, {**arguments(backend, dtype, rows=4, width=8, vocab=vocab), **options}, dtype)


def test_the_workspace_is_bounded() -> None:
    for vocab in (64, 50304, 262144, 1 << 22):
        rows = cuda.block_rows(1 << 20, 2 * vocab)
        assert 2 * vocab * rows <= cuda.BLOCK_BYTES and rows >= 32
    assert cuda.block_rows(3000, 2 * 50304) == 1536  # two equal blocks of whole tiles
    assert cuda.block_rows(5, 1 << 40) == 1


def test_a_target_outside_the_vocabulary_is_nan_on_the_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU Python looks at the targets first; the kernel must not read or write elsewhere for them."""
    _unchecked(monkeypatch, cuda)
    call = {**arguments(backend, torch.float32), "reduction": "none"}
    wrong = torch.tensor([1, 33, 69])
    call["targets"][wrong] = torch.tensor([-1, 77, 1 << 40], device=call["x"].device)
    x = call["x"].requires_grad_()
    with fastlm.backend(backend):
        loss = linear_cross_entropy(**call)
        (dx,) = torch.autograd.grad(loss.nansum(), x)
    right = torch.ones(70, dtype=torch.bool)
    right[wrong] = False
    assert loss[wrong].isnan().all() and dx[wrong].isnan().all()
    assert loss[right].isfinite().all() and dx[right].isfinite().all()


def _unchecked(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    assert module.check_targets is reference.check_targets
    monkeypatch.setattr(module, "check_targets", lambda *arguments: True)


def test_ignored_rows_may_hold_anything(backend: str) -> None:
    """Their logits are made, and nothing of them is used."""
    call = arguments(backend, torch.float32)
    call["x"][::5] = float("nan")
    with fastlm.backend(backend):
        outputs, (dx, _), _ = run(linear_cross_entropy, call)
    assert outputs[0].isfinite() and dx.isfinite().all()
    assert not dx[::5].any()
