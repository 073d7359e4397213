"""The CPU kernel of the MLP block: bits that do not depend on the threads, blocks of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.ops import mlp, native
from fastlm.ops.mlp import native as mlp_native
from fastlm.ops.mlp import reference
from fastlm.ops.mlp.reference import ACTIVATIONS, GATED

if native.cpu_unavailable() is not None:
    pytest.skip(str(native.cpu_unavailable()), allow_module_level=True)


@pytest.fixture
def threads():
    """Gives back the number of threads that was set."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def kernel(activation: str, rows: int, cols: int, dtype: torch.dtype) -> list[Tensor]:
    """Both kernels alone, without matrix products: pre, hidden, dpre, hidden again, dbias."""
    generator = torch.Generator().manual_seed(1)
    wide = 2 * cols if activation in GATED else cols
    pre, bias, dhidden = (torch.randn(s, generator=generator).to(dtype) for s in ((rows, wide), (wide,), (rows, cols)))
    hidden, again = torch.empty_like(dhidden), torch.empty_like(dhidden)
    code = mlp_native.CODE[activation], native.DTYPE_CODE[dtype]
    native.C.activation_forward(pre.data_ptr(), bias.data_ptr(), hidden.data_ptr(), rows, cols, *code)
    dpre = torch.empty_like(pre)
    dbias = mlp_native._activate_backward(pre, dhidden, dpre, again, activation, True, dtype)
    assert dbias is not None
    return [pre, hidden, dpre, again, dbias]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_on_1_2_and_3_threads(activation: str, dtype: torch.dtype, threads) -> None:
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(kernel(activation, 301, 333, dtype))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    _, hidden, dpre, again, dbias = results[0]
    assert torch.equal(hidden, again)  # the backward pass sees the forward's activation
    rounding = torch.finfo(dtype).eps * dpre.double().abs().sum(0)  # the kernel sums before it rounds
    assert ((dbias.double() - dpre.double().sum(0)).abs() <= rounding).all()


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows(activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks give what one block gives, but for the order of the sums."""
    hidden = 48 if activation in GATED else 24
    shapes = [(131, 16), (hidden, 16), (hidden,), (8, 24), (8,)]
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]

    def gradients() -> list[Tensor]:
        with fastlm.backend("cpu"):
            y = mlp(*leaves, activation=activation)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    whole = gradients()
    monkeypatch.setattr(mlp_native, "BLOCK_BYTES", 16 * hidden * leaves[0].element_size())
    blocked = gradients()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(whole, blocked, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * a.abs().max().item())
    assert not torch.equal(whole[2], blocked[2]) or dtype == torch.bfloat16  # it was in blocks


def test_the_reference_agrees_on_the_codes() -> None:
    assert [mlp_native.CODE[a] for a in ("gelu_tanh", "gelu", "relu", "relu2", "silu", "swiglu", "geglu")] == list(
        range(7)
    )
    with pytest.raises(ValueError, match="activation code 7; wanted 0 to 6"):
        native.C.activation_forward(0, 0, 0, 0, 0, 7, 0)
    assert reference.unsupported() is None


def test_float64_is_left_to_the_reference() -> None:
    leaves = [torch.randn(s, dtype=torch.float64) for s in ((3, 4), (6, 4), (6,), (4, 6), (4,))]
    assert fastlm.ops.explain("mlp", *leaves).chosen == "reference"
    with fastlm.backend("cpu"), pytest.raises(fastlm.UnsupportedError, match="got torch"):
        mlp(*leaves)
