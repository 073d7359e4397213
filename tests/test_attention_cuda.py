"""The CUDA kernels of attention, on the emulator: what the op suite does not reach."""

from __future__ import annotations

import pytest
import torch

import fastlm
from fastlm import ops
from fastlm.ops import native, philox
from fastlm.ops.attention import native as attention
from tests.emulator import backend, harness
from tests.op_suite import run

pytestmark = pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable()))


def gradients(arguments: dict) -> list[torch.Tensor]:
    with fastlm.backend("emulator"):
        outputs, found, _ = run(ops.attention, arguments)
    return [*outputs, *found]


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window": (20, 9), "dropout_p": 0.3, "softcap": 4.0}], ids=["plain", "general"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_the_order_of_threads_does_not_matter(dtype: torch.dtype, options: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 70, 2, 64, generator=generator).to(dtype)
    k, v = (torch.randn(1, 90, 1, 64, generator=generator).to(dtype) for _ in range(2))
    arguments = {"q": q, "k": k, "v": v, "return_lse": True, **options}
    first = gradients(arguments)
    for order in (("lifo", 0), ("random", 1), ("random", 2)):
        with harness.schedule(*order):
            again = gradients(arguments)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b), order


def test_a_row_that_sees_nothing_hides_nan_of_others() -> None:
    """Values that a row does not see must not reach it, not even as 0 * NaN, from a tile that is seen in part."""
    q, k, v = (torch.randn(1, 24, 1, 64, dtype=torch.bfloat16) for _ in range(3))
    ends = torch.tensor([0, 11, 24], dtype=torch.int32)
    k[:, :11], v[:, :11] = torch.nan, torch.nan
    found = gradients({"q": q, "k": k, "v": v, "cu_seqlens": ends})
    out, _, dk, dv = found
    assert out[:, 11:].isfinite().all() and dk[:, 11:].isfinite().all() and dv[:, 11:].isfinite().all()
    assert out[:, :11].isnan().all()


def kernel_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """The compiled forward, without what native.py does before it."""
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    inputs = attention._inputs(q, k, v, None, None, None, 1.0, -1, -1, 0.0, 0.0, q.shape[1])
    with backend.emulated():
        native.C.attention_forward(True, out.data_ptr(), lse.data_ptr(), *inputs, 0)


def test_what_the_kernel_cannot_read_is_refused_by_name() -> None:
    t = torch.randn(2, 9, 2, 72, dtype=torch.float16)
    whole = t[..., :64].contiguous()
    with pytest.raises(ValueError, match="attention: q must be aligned to 16 bytes"):
        kernel_call(t[..., 1:65], whole, whole)
    odd = torch.randn(2, 9, 2, 65, dtype=torch.float16)[..., :64]
    with pytest.raises(ValueError, match="attention: v must be aligned to 16 bytes, its strides too"):
        kernel_call(whole, whole, odd)
    with pytest.raises(ValueError, match="multiples of 8 up to 256, got 12"):
        kernel_call(*(torch.randn(1, 4, 1, 12, dtype=torch.float16) for _ in range(3)))
    with pytest.raises(ValueError, match="multiples of 8 up to 256, got 264"):
        kernel_call(*(torch.randn(1, 4, 1, 264, dtype=torch.float16) for _ in range(3)))


def test_a_gradient_that_the_kernel_cannot_write_is_refused_by_name() -> None:
    q = torch.randn(2, 9, 2, 64, dtype=torch.float16)
    odd = torch.empty(2, 9, 2 * 64 + 4, dtype=torch.float16)[..., : 2 * 64].unflatten(2, (2, 64))
    options = None, None, None, 0.1, -1, -1, 0.0, 0.0, 9
    with backend.emulated():
        out, lse = attention.forward(q, q, q, *options)
        for gradients, name in (((odd, q, q), "dq"), ((q, odd, odd), "dk")):
            with pytest.raises(ValueError, match=f"attention: {name} must be aligned to 16 bytes, its strides too"):
                attention.backward(out, None, q, q, q, out, lse, *options, *gradients)


def test_a_head_dim_over_256_is_unsupported() -> None:
    q = torch.randn(1, 4, 1, 264)
    with fastlm.backend("emulator"), pytest.raises(fastlm.UnsupportedError, match="head dims up to 256, got 264"):
        ops.attention(q, q, q)


def test_aligned_slices_are_read_in_place() -> None:
    q, k, v = torch.randn(2, 9, 3, 2, 64, dtype=torch.bfloat16).unbind(2)
    with backend.emulated():
        for t in (q, k, v):
            assert attention._rows(t) is t
        copy = attention._rows(torch.randn(2, 9, 2, 65, dtype=torch.bfloat16)[..., 1:])
    assert copy.is_contiguous() and copy.data_ptr() % 16 == 0


@pytest.mark.parametrize("start", [0, 3, 8, 13])
def test_dropout_drops_what_the_reference_drops(start: int) -> None:
    """With values that are the unit vectors the output is the weights themselves, wherever a sequence begins."""
    length, width = 48, 64
    q = torch.zeros(1, length, 2, width)
    v = torch.eye(length, width)[None, :, None].expand(1, length, 2, width).contiguous()
    arguments = {"q": q, "k": q, "v": v, "dropout_p": 0.4}
    arguments["cu_seqlens"] = torch.tensor([0, start, length], dtype=torch.int32)
    torch.manual_seed(3)
    with fastlm.backend("emulator"), torch.no_grad():
        out = ops.attention(**arguments)
    torch.manual_seed(3)
    kept = philox.keep_mask(philox.draw_state(q.device), 0.4, torch.arange(2)[None], range(length), range(length))
    same = torch.arange(length) >= start
    expected = kept & (same[:, None] == same)
    assert torch.equal(out[..., :length].transpose(1, 2) > 0, expected)


@pytest.mark.parametrize("resident", [1, 3])
def test_the_backward_in_one_pass_needs_no_more_blocks_than_run(monkeypatch: pytest.MonkeyPatch, resident: int) -> None:
    """Blocks that wait for a turn wait only for blocks that began before them, in any order of the grid's blocks."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 200, 1, 64, generator=generator).to(torch.bfloat16) for _ in range(3))
    arguments = {"q": q, "k": k, "v": v, "window": (150, 40)}
    first = gradients(arguments)
    monkeypatch.setenv("FASTLM_EMULATOR_RESIDENT", str(resident))
    with harness.schedule("random", 3):
        again = gradients(arguments)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window": (70, 60), "dropout_p": 0.2}], ids=["plain", "general"]
)
def test_gpus_with_less_shared_memory(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    """The backward of 128 wide heads takes smaller blocks there; it sums in another order, so only nearly the same."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 150, 2, 128, generator=generator).to(torch.bfloat16)
    k, v = (torch.randn(1, 170, 1, 128, generator=generator).to(torch.bfloat16) for _ in range(2))
    found = []
    for shared in (227, 163, 99):
        monkeypatch.setenv("FASTLM_EMULATOR_SHARED", str(shared * 1024))
        torch.manual_seed(1)
        found.append(gradients({"q": q, "k": k, "v": v, **options}))
    for large, ampere, small in zip(*found, strict=True):
        assert torch.equal(large, ampere)
        torch.testing.assert_close(small, large, rtol=0.02, atol=0.02)
