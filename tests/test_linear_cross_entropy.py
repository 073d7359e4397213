"""linear_cross_entropy beyond the op suite: against F.cross_entropy, memory, targets, autocast, compile, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.ops import linear_cross_entropy
from fastlm.ops.linear_cross_entropy import reference


def inputs(rows: int = 10, width: int = 16, vocab: int = 33, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype) * 0.3
    return x, weight, torch.randint(0, vocab, (rows,), generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
def test_is_torchs_cross_entropy(reduction: str, label_smoothing: float) -> None:
    x, weight, targets = inputs(dtype=torch.float64)
    targets[2] = -100
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    got = linear_cross_entropy(x, weight, targets, reduction=reduction, label_smoothing=label_smoothing)
    wanted = F.cross_entropy(F.linear(x, weight), targets, reduction=reduction, label_smoothing=label_smoothing)
    torch.testing.assert_close(got, wanted)
    upstream = torch.full_like(got, 0.7)
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_loss_by_hand() -> None:
    x, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3.0)]])  # probabilities 1/4 and 3/4
    assert linear_cross_entropy(x, weight, torch.tensor([0])).item() == pytest.approx(math.log(4.0))
    with_z = linear_cross_entropy(x, weight, torch.tensor([1]), z_loss=0.5).item()
    assert with_z == pytest.approx(math.log(4 / 3) + 0.5 * math.log(4.0) ** 2)
    capped = linear_cross_entropy(x, weight, torch.tensor([0]), softcap=1.0).item()
    assert capped == pytest.approx(math.log(1 + math.exp(math.tanh(math.log(3.0)))))


def test_mean_over_no_row_is_nan_with_zero_gradients() -> None:
    x, weight, _ = inputs()
    x.requires_grad_()
    weight.requires_grad_()
    targets = torch.full((10,), -100)
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss.isnan() and F.cross_entropy(x @ weight.T, targets).isnan()
    assert not x.grad.any() and not weight.grad.any()
    assert linear_cross_entropy(x[:0], weight, targets[:0]).isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", [33, -1, 10**12])
def test_targets_outside_the_vocabulary(reduction: str, target: int) -> None:
    x, weight, targets = inputs()
    targets[4] = target
    with pytest.raises(IndexError, match=rf"target {target} is outside the vocabulary: wanted 0 <= target < 33"):
        linear_cross_entropy(x, weight, targets, reduction=reduction)
    assert linear_cross_entropy(x, weight, targets, reduction=reduction, ignore_index=target).isfinite().all()


def test_where_nothing_can_be_raised_a_wrong_target_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU cannot raise without being waited for: its path, run on the CPU."""
    monkeypatch.setattr(reference, "check_targets", lambda *args: None)
    x, weight, targets = inputs()
    targets[4], targets[5] = 33, -100
    x.requires_grad_()
    with fastlm.backend("reference"):
        for reduction in ("mean", "sum"):
            loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
            assert loss.isnan()
            (dx,) = torch.autograd.grad(loss, x)
            assert dx[4].isnan().all() and dx.isfinite().all(1).sum() == 9 and not dx[5].any()
        rows = linear_cross_entropy(x, weight, targets, reduction="none")
        assert rows.isnan().nonzero().tolist() == [[4]] and rows[5] == 0
        (dx,) = torch.autograd.grad(rows.sum(), x)
        assert dx[4].isnan().all() and dx.isfinite().all(1).sum() == 9


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in (result if isinstance(result, tuple) else [result]) if isinstance(t, Tensor)]
        self.bytes = max(self.bytes, *(t.untyped_storage().nbytes() for t in made), 0)
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_all_logits(reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1 << 17
    monkeypatch.setattr(reference, "BLOCK_BYTES", limit)
    x, weight, targets = inputs(rows=1000, width=4, vocab=2000, dtype=dtype)
    options = (-100, 0.1, 1e-3, 5.0)
    with _Largest() as largest:
        loss, lse, _, _ = reference.forward(x, weight, targets, reduction, *options, [True, True])
        if reduction == "none":
            reference.backward(loss, x, weight, targets, lse, *options, [True, True])
    wide = 4 // x.element_size()  # the float32 copy of a block in half precision
    assert limit / 2 <= largest.bytes <= limit * wide
    with _Largest() as textbook:
        F.cross_entropy(F.linear(x, weight).float(), targets)
    assert textbook.bytes == 1000 * 2000 * 4


@pytest.mark.parametrize("rows", [0, 1, 7, 16, 100, 1024, 5000, 100_003])
@pytest.mark.parametrize("vocab", [1, 65, 50257, 10**9])
def test_blocks_cover_and_stay_within_bounds(rows: int, vocab: int) -> None:
    step = reference.block_rows(rows, vocab, 4)
    assert 1 <= step <= reference.MAX_ROWS
    assert step == 1 or step * vocab * 4 <= reference.BLOCK_BYTES


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = inputs(rows=100, dtype=torch.float64)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    whole = linear_cross_entropy(x, weight, targets)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 33 * 8 * 16)
    blocked = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(blocked, whole)
    for a, b in zip(torch.autograd.grad(blocked, leaves), torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_gradients_are_not_shared_with_what_was_saved(scale: float) -> None:
    """Two backward passes through one graph, the first gradient changed in between: an error, or the same again."""
    x, weight, targets = inputs()
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets) * scale
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad.mul_(5)
    weight.grad = None
    loss.backward()
    assert torch.equal(weight.grad, first)


@pytest.mark.parametrize("asked", ["x", "weight"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_the_gradient_asked_for(asked: str, reduction: str) -> None:
    x, weight, targets = inputs()
    both = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    linear_cross_entropy(*both, targets, reduction=reduction).sum().backward()
    leaf = x.requires_grad_() if asked == "x" else weight.requires_grad_()
    linear_cross_entropy(x, weight, targets, reduction=reduction).sum().backward()
    torch.testing.assert_close(leaf.grad, both[asked == "weight"].grad)
    assert (weight if asked == "x" else x).grad is None


def test_float16_gradients_do_not_vanish() -> None:
    """p / N is too small for float16; the gradients are as good as those of float32 all the same."""
    x, weight, targets = inputs(rows=4096, width=8, vocab=64, dtype=torch.float16)
    weight = weight * 0.01
    leaf = x.clone().requires_grad_()
    (linear_cross_entropy(leaf, weight, targets) * 65536.0).backward()
    wanted = x.float().requires_grad_()
    (F.cross_entropy(wanted @ weight.float().T, targets) * 65536.0).backward()
    torch.testing.assert_close(leaf.grad.float(), wanted.grad, rtol=5e-3, atol=1e-3)


def test_autocast_gives_float32_weights_an_unrounded_gradient() -> None:
    x, weight, targets = inputs(rows=64)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
        loss.backward()
    assert loss.dtype == torch.float32 and all(t.grad.dtype == torch.float32 for t in leaves)
    low = [t.detach().bfloat16().requires_grad_() for t in leaves]
    plain = linear_cross_entropy(*low, targets)
    plain.backward()
    assert torch.equal(loss, plain)
    for leaf, rounded in zip(leaves, low, strict=True):
        assert torch.equal(leaf.grad.bfloat16(), rounded.grad)


def test_autocast_leaves_float64_alone() -> None:
    x, weight, targets = inputs(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float64 and torch.equal(loss, linear_cross_entropy(x, weight, targets))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(reduction: str, dtype: torch.dtype) -> None:
    x, weight, targets = inputs(dtype=dtype)
    backend = fastlm.ops.explain("linear_cross_entropy", x, weight, targets).chosen
    ops = torch.ops.fastlm
    options = (-100, 0.1, 1e-3, 5.0)
    for needs in ([True, True], [True, False], [False, True], [False, False]):
        torch.library.opcheck(
            ops.linear_cross_entropy_forward, (x, weight, targets, reduction, *options, needs, backend)
        )
        if reduction == "none":
            loss, lse, _, _ = ops.linear_cross_entropy_forward(x, weight, targets, "none", *options, needs, backend)
            torch.library.opcheck(
                ops.linear_cross_entropy_backward, (loss, x, weight, targets, lse, *options, needs, backend)
            )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction: str) -> None:
    x, weight, targets = inputs()
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def step(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, reduction=reduction).sum() * 0.5

    loss, wanted = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), step(*leaves)
    assert torch.equal(loss, wanted)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_huge_and_tiny_logits(scale: float) -> None:
    x, weight, targets = inputs()
    got, wanted = (
        f.item()
        for f in (
            linear_cross_entropy(x * scale, weight, targets),
            F.cross_entropy((x * scale).double() @ weight.double().T, targets),
        )
    )
    assert got == pytest.approx(wanted, rel=1e-5)


def test_nan_and_infinity_reach_the_loss() -> None:
    for value in (float("nan"), float("inf")):
        x, weight, targets = inputs()
        x[3, 2] = value
        rows = linear_cross_entropy(x, weight, targets, reduction="none")
        assert rows.isnan().nonzero().tolist() == [[3]]


def test_bad_input() -> None:
    x, weight, targets = inputs()
    call = linear_cross_entropy
    with pytest.raises(ValueError, match=r"weight must have shape \(V, C\), C = 16 .* got \(16, 33\)"):
        call(x, weight.T, targets)
    with pytest.raises(ValueError, match=r"targets must have shape .* = \(10,\), got \(9,\)"):
        call(x, weight, targets[:9])
    with pytest.raises(ValueError, match=r"targets must be int64, got torch.int32"):
        call(x, weight, targets.int())
    with pytest.raises(ValueError, match=r"weight is torch.bfloat16, but x is torch.float32"):
        call(x, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"weight is on meta, but x is on cpu"):
        call(x, weight.to("meta"), targets)
    with pytest.raises(ValueError, match=r"weight must not be empty, got shape \(0, 16\)"):
        call(x, weight[:0], targets)
    with pytest.raises(ValueError, match=r"weight must not be empty, got shape \(33, 0\)"):
        call(x[:, :0], weight[:, :0], targets)
    with pytest.raises(ValueError, match=r"reduction must be one of mean, sum, none, got 'average'"):
        call(x, weight, targets, reduction="average")
    with pytest.raises(ValueError, match=r"label_smoothing must be between 0 and 1, got 1.5"):
        call(x, weight, targets, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"z_loss must be finite and not negative, got -1"):
        call(x, weight, targets, z_loss=-1)
    with pytest.raises(ValueError, match=r"softcap must be finite and not negative, got nan"):
        call(x, weight, targets, softcap=float("nan"))
    with pytest.raises(ValueError, match=r"x must be float32, bfloat16, float16 or float64, got torch.int64"):
        call(x.long(), weight, targets)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_later_backward_pass_leaves_the_gradients_of_the_one_before_alone(reduction: str) -> None:
    x, weight, targets = inputs()
    leaves = x.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(loss * 0.5, leaves)
    for kept, copy, half in zip(first, copies, second, strict=True):
        assert torch.equal(kept, copy)
        torch.testing.assert_close(half, copy * 0.5)


def test_a_logit_of_minus_infinity() -> None:
    x, weight = torch.tensor([[1e20, 0.0]]), torch.tensor([[1.0, 0.0], [-1e20, 0.0], [0.5, 0.0]])
    assert linear_cross_entropy(x, weight, torch.tensor([0])).item() == 0.0
