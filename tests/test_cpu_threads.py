"""What the CPU backend computes has the same bits on 1, 2, 3 and more threads than there are cores.

Matrix products are the library's (linear, mlp, linear_cross_entropy), which keeps to one order where fastlm.ops.mkl
could ask it to; large ones are our own where the library lags. Elsewhere the kernels between the products are tested
alone, in test_mlp_cpu.py and test_linear_cross_entropy_cpu.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops import mkl, native, products
from fastlm.ops.case import Maker
from tests.op_suite import first_cases, run

if native.cpu_unavailable() is not None:
    pytest.skip(str(native.cpu_unavailable()), allow_module_level=True)

COUNTS = (1, 2, 3, 2 * (os.cpu_count() or 1) + 1)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Gives back the number of threads that was set."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


# Large enough that the work is shared out (test_native_sanitize.py checks that of the kernels).
CALLS: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "layer_norm": lambda d: {"x": tensor(d, 150, 768), "weight": tensor(d, 768), "bias": tensor(d, 768)},
    "rms_norm": lambda d: {"x": tensor(d, 150, 768), "weight": tensor(d, 768)},
    "attention": lambda d: {name: tensor(d, 2, 150, 4, 32) for name in "qkv"},
    # Sizes at which MKL's bits follow the number of threads unless it is asked for an order.
    "linear": lambda d: {"x": tensor(d, 768, 512), "weight": tensor(d, 128, 512), "bias": tensor(d, 128)},
    "mlp": lambda d: {
        "x": tensor(d, 512, 333),
        "fc_weight": tensor(d, 1000, 333) / 16,
        "fc_bias": tensor(d, 1000),
        "proj_weight": tensor(d, 129, 1000) / 16,
        "proj_bias": tensor(d, 129),
    },
    "linear_cross_entropy": lambda d: {
        "x": tensor(d, 512, 64),
        "weight": tensor(d, 5003, 64) / 8,
        "targets": torch.arange(512) * 9,
    },
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_THE_LIBRARY = {"linear", "mlp", "linear_act", "linear_cross_entropy"}


def skip_without_order(op: str, dtype: torch.dtype = torch.float32, large: bool = False) -> None:
    if op not in BY_THE_LIBRARY or (large and products.library_lags()):
        return
    if dtype != torch.float32 and not products.widens(dtype):
        pytest.skip("oneDNN, which multiplies in half precision here, cannot be asked for an order")
    if not mkl.fix_order():
        pytest.skip("the library that multiplies here was not asked for an order (fastlm.ops.mkl)")


def bits(op: str, arguments: dict[str, Any]) -> list[Tensor | None]:
    with fastlm.backend("cpu"):
        outputs, gradients, _ = run(getattr(ops, op), arguments)
    return [*outputs, *gradients]


def check(op: str, arguments: dict[str, Any], threads: Callable[[int], None]) -> None:
    wanted = None
    for count in COUNTS:
        threads(count)
        got = bits(op, arguments)
        wanted = wanted or got
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            same = (a is None and b is None) or torch.equal(a, b)
            assert same, f"result {i} on {count} threads is not that of {COUNTS[0]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op", CALLS)
def test_large(op: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    skip_without_order(op, dtype, large=True)
    check(op, CALLS[op](dtype), threads)


def test_a_step_of_a_model(threads: Callable[[int], None]) -> None:
    skip_without_order("linear")
    torch.manual_seed(0)
    config = fastlm.GPTConfig(vocab_size=1000, block_size=96, n_layer=2, n_head=3, n_embd=192)
    model, ids = fastlm.GPT(config), torch.randint(1000, (5, 97))
    wanted: list[Tensor] = []
    for count in COUNTS:
        threads(count)
        model.zero_grad(set_to_none=True)
        _, loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        got = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        wanted = wanted or got
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), f"{count} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rows", [2, 16])
def test_few_rows(rows: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """The product of our own: each row's bits do not depend on the other rows either."""
    x, weight, bias = tensor(dtype, rows, 768), tensor(dtype, 1001, 768), tensor(dtype, 1001)
    results = []
    with fastlm.backend("cpu"), torch.no_grad():
        for count in COUNTS:
            threads(count)
            results += [ops.linear(x, weight, bias), ops.linear(x[:2], weight, bias)]
    assert all(torch.equal(r, results[0]) for r in results[::2])
    assert all(torch.equal(r, results[0][:2]) for r in results[1::2])


@pytest.mark.parametrize("case", first_cases(), ids=str)
def test_small(case: Any, threads: Callable[[int], None]) -> None:
    skip_without_order(case.op)
    check(case.op, case.build(Maker(torch.float32)), threads)
