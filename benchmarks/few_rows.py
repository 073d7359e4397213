"""Products of few rows by a layer's weights on the CPU: our kernel beside PyTorch's library, and what prompts gain.

    python -m benchmarks.few_rows

Each product goes through as many weights as do not fit the caches, as a model's layers do, the two in turn. The
prompts are read by GPT-2 124M with random weights, with our kernel and without it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from unittest import mock

import torch
from torch import Tensor

import fastlm
from fastlm.ops import products

WEIGHTS = ((768, 768), (768, 3072), (3072, 768), (2048, 5632))  # (depth, columns)
HEAD = (768, 50304)
ROWS = (17, 32, 64, 128, 256, 400)
PROMPTS = (32, 64, 128, 256)
BEYOND_CACHES = 96 << 20  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for name in options.dtypes.split(","):
        dtype = getattr(torch, name)
        print(f"{name}: how many times as fast as the library, by rows")
        for depth, columns in WEIGHTS:
            print(f"  {depth} x {columns}:", *(_product(rows, depth, columns, dtype, options.rounds) for rows in ROWS))
        print(f"  {HEAD[0]} x {HEAD[1]}:", _product(208, *HEAD, dtype, options.rounds))
        _prompts(dtype, options.rounds)


def _product(rows: int, depth: int, columns: int, dtype: torch.dtype, rounds: int) -> str:
    count = max(2, BEYOND_CACHES // (depth * columns * dtype.itemsize))
    weights = cycle([torch.randn(columns, depth).to(dtype) for _ in range(min(count, 48))])
    x, y = torch.randn(rows, depth).to(dtype), torch.empty(rows, columns, dtype=dtype)

    def ours() -> None:
        products.narrow(x, next(weights), None, y)

    def library() -> None:
        with _without_our_kernels():
            products.mm(x, next(weights).t(), y)

    return f"{rows} {_ratio(ours, library, rounds):.2f}x"


@torch.no_grad()
def _prompts(dtype: torch.dtype, rounds: int) -> None:
    model = fastlm.GPT(fastlm.GPTConfig.preset("gpt2")).eval().to(dtype)

    def read(prompt: Tensor) -> None:
        model.hidden_states(prompt)

    def read_without(prompt: Tensor) -> None:
        with _without_our_kernels():
            model.hidden_states(prompt)

    results = []
    for length in PROMPTS:
        prompt = torch.arange(length)[None]
        ratio = _ratio(lambda p=prompt: read(p), lambda p=prompt: read_without(p), rounds)  # type: ignore[misc]
        results.append(f"{length} {ratio:.2f}x")
    print("  prompts of GPT-2 124M, by tokens:", *results, flush=True)


def _ratio(ours: Callable[[], None], library: Callable[[], None], rounds: int) -> float:
    """The library's median time over ours."""
    seconds: dict[Callable[[], None], list[float]] = {ours: [], library: []}
    for round_ in range(rounds + 1):  # the first is not counted
        for call in (ours, library) if round_ % 2 else (library, ours):
            start = time.perf_counter()
            call()
            if round_:
                seconds[call].append(time.perf_counter() - start)
    return statistics.median(seconds[library]) / statistics.median(seconds[ours])


@contextmanager
def _without_our_kernels() -> Iterator[None]:
    with (
        mock.patch.object(products, "NARROW_ROWS", 0),
        mock.patch.object(products, "library_lags", lambda: False),
    ):
        yield


if __name__ == "__main__":
    main()
