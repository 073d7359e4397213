"""What a call of an op costs before its kernel does anything: tiny tensors, beside F.layer_norm."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.bench.ops import BACKWARD, FORWARD
from fastlm.bench.timing import BASELINE, Comparison, Result

RECORDED = "forward, recorded for autograd"


def compare_overhead(samples: int = 200) -> list[Comparison]:
    """Seconds a call on a (4, 64) CPU tensor with one thread, the smallest of many short samples.

    The overhead is a property of the program; everything that disturbs it makes it longer. So here the smallest sample
    counts, not the median.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_compare(mode, samples) for mode in (FORWARD, RECORDED, BACKWARD)]
    finally:
        torch.set_num_threads(threads)


def _compare(mode: str, samples: int) -> Comparison:
    x, weight, bias = torch.randn(4, 64), torch.ones(64), torch.zeros(64)
    leaves = [t.requires_grad_(mode != FORWARD) for t in (x, weight, bias)]
    upstream = torch.ones(4, 64)

    def with_backward(call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(), leaves, upstream)

    calls: dict[str, Callable[[], Any]] = {
        BASELINE: lambda: F.layer_norm(x, (64,), weight, bias),
        "fastlm": lambda: ops.layer_norm(x, weight, bias),
    }
    if mode == BACKWARD:
        calls = {name: with_backward(call) for name, call in calls.items()}
    best = {name: _smallest(call, 20) for name, call in calls.items()}
    for _ in range(samples):  # in turns
        for name, call in calls.items():
            best[name] = min(best[name], _smallest(call, 1))
    return Comparison("overhead", "layer_norm 4x64", mode, "float32", [Result(n, [s]) for n, s in best.items()])


def _smallest(call: Callable[[], Any], samples: int, calls: int = 20) -> float:
    best = float("inf")
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best
