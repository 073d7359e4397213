"""The CPU kernel of linear_cross_entropy: bits that do not depend on the threads, ignored rows, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.ops import linear_cross_entropy, native
from fastlm.ops.linear_cross_entropy import native as cpu
from fastlm.ops.linear_cross_entropy import reference

if native.cpu_unavailable() is not None:
    pytest.skip(str(native.cpu_unavailable()), allow_module_level=True)


class Made(TorchDispatchMode):
    """The bytes of every memory that an operation made or used."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                self.bytes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return result


def block(logits: Tensor, targets: Tensor, softcap: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel alone: loss, lse, gradient."""
    gradient, loss, lse = logits.clone(), torch.empty(len(logits)), torch.empty(len(logits))
    native.C.cross_entropy_block(
        gradient.data_ptr(), targets.data_ptr(), loss.data_ptr(), lse.data_ptr(), 0, *logits.shape,
        0.1, 1e-2, softcap, 0.5, True, native.DTYPE_CODE[logits.dtype],
    )  # fmt: skip
    return loss, lse, gradient


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 3, 65, 1003])
def test_the_same_bits_on_1_2_and_3_threads(vocab: int, dtype: torch.dtype, softcap: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(301, vocab, generator=generator).to(dtype)
    targets = torch.randint(0, vocab, (301,), generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(block(logits, targets, softcap))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    z = logits.float()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    lse = z.logsumexp(1)
    wanted = F.cross_entropy(z, targets, reduction="none", label_smoothing=0.1) + 1e-2 * lse.square()
    torch.testing.assert_close(results[0][0], wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(results[0][1], lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_are_not_computed(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in a row that is ignored reaches neither the loss nor any gradient."""
    x, weight = torch.randn(9, 8), torch.randn(20, 8)
    targets = torch.randint(0, 20, (9,))
    targets[[1, 4]] = -100
    x[[1, 4]] = float("nan")
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with fastlm.backend("cpu"):
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
        gradients = torch.autograd.grad(loss.sum(), leaves)
    assert loss.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert not gradients[0][[1, 4]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_and_slices(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks of rows, and in half precision many slices of the vocabulary, give what one gives."""
    x, weight = torch.randn(100, 16).to(dtype).requires_grad_(), torch.randn(333, 16).to(dtype).requires_grad_()
    targets = torch.randint(0, 333, (100,))

    def results() -> list[Tensor]:
        with fastlm.backend("cpu"):
            loss = linear_cross_entropy(x, weight, targets)
        return [loss, *torch.autograd.grad(loss, [x, weight])]

    whole = results()
    monkeypatch.setattr(cpu, "block_rows", lambda *args: 16)
    monkeypatch.setattr(cpu, "_SLICE_BYTES", 16 * 2 * 50)
    for a, b in zip(whole, results(), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * a.abs().max().item())


def test_a_large_batch_has_blocks_of_an_eighth_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1 << 17)
    x, weight, targets = torch.randn(1000, 4), torch.randn(2000, 4), torch.randint(0, 2000, (1000,))
    with Made() as made:
        loss, _, _, _ = cpu.forward(x, weight, targets, "mean", -100, 0.0, 0.0, 0.0, [True, True])
    assert max(made.bytes.values()) == 112 * 2000 * 4
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x @ weight.T, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_block_of_logits_is_all_there_is(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is larger than a block, and a pass has one block."""
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1 << 17)
    monkeypatch.setattr(cpu, "_MANY_ROWS", 16)
    x, weight, targets = torch.randn(1000, 4).to(dtype), torch.randn(2000, 4).to(dtype), torch.randint(0, 2000, (1000,))
    with Made() as made:
        loss, lse, _, _ = cpu.forward(x, weight, targets, "mean", -100, 0.1, 1e-3, 5.0, [True, True])
        cpu.backward(torch.ones(1000), x, weight, targets, torch.zeros(1000), -100, 0.1, 1e-3, 5.0, [True, True])
    large = {storage for storage, size in made.bytes.items() if size > 2000 * 4 * 4}
    assert 1 <= len(large) <= 2 and (1 << 16) <= max(made.bytes.values()) <= 1 << 17
    assert loss.isfinite() and lse.numel() == 0
