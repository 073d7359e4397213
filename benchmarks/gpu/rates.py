"""Bytes and operations of a case, and what part of the machine's measured ceilings a time is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlm.bench import timing
from fastlm.bench.ops import BACKWARD, call_of
from fastlm.bench.peers import Peer
from fastlm.ops.case import Case

_FLUSHED_BYTES = 256 << 20  # more than any GPU's L2 holds


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: FLOP/s of a matrix product, and bytes/s of a copy (read and written)."""

    product: float
    copy: float


def measure_ceilings(device: str, dtype: torch.dtype, size: int = 8192, copied: int = 1 << 30) -> Ceilings:
    """The best of ten: a product of size x size matrices by torch, and a copy of `copied` bytes."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a @ b, target.copy_(source)
    product = min(timing.seconds_of(lambda: a @ b, 3) for _ in range(10))
    copy = min(timing.seconds_of(lambda: target.copy_(source), 3) for _ in range(10))
    return Ceilings(2.0 * size**3 / product, 2.0 * copied / copy)


def kernel_seconds(calls: dict[str, Callable[[], Any]], repeats: int = 3) -> dict[str, float]:
    """The time of each call's kernels alone, by the profiler: what is left where a CUDA graph or a long queue hides the
    launches. Before each call the GPU's cache is filled with other data. Empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    other = torch.zeros(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for call in calls.values():
            for _ in range(repeats):
                torch.bitwise_not(other, out=other)
                call()
        torch.cuda.synchronize()
    kernels = [e for e in profiled.events() if e.device_type == DeviceType.CUDA]
    ordered = sorted((e.time_range.start, e.time_range.elapsed_us(), e.name) for e in kernels)
    seconds = between_markers([(name, 1e-6 * us) for _, us, name in ordered])
    return {
        name: sum(seconds[repeats * i : repeats * (i + 1)]) / repeats
        for i, name in enumerate(calls)
        if len(seconds) == repeats * len(calls)
    }


def between_markers(kernels: Iterable[tuple[str, float]], marker: str = "bitwise_not") -> list[float]:
    """The sums of what comes after each kernel whose name has the marker's, of (name, seconds) in their order."""
    sums: list[float] = []
    for name, seconds in kernels:
        if marker in name:
            sums.append(0.0)
        elif sums:
            sums[-1] += seconds
    return sums


@dataclass(frozen=True)
class Cost:
    """What a call cannot avoid: its matrix products' operations, and each tensor of it once."""

    flops: float
    bytes: float


def cost_of(case: Case, arguments: dict[str, Any], mode: str) -> Cost:
    """Operations are those of the textbook function, half of an attention's where it is causal; bytes are those of the
    inputs and outputs, and with the backward of their gradients too."""
    from torch.utils.flop_counter import FlopCounterMode

    eager = Peer("eager", case.eager)
    with FlopCounterMode(display=False) as counter:
        call_of(eager, arguments, mode)()
    flops = float(counter.get_total_flops())
    if arguments.get("causal") and ("qkv" in arguments or arguments["q"].shape[1] == arguments["k"].shape[1]):
        flops /= 2
    with torch.no_grad():
        result = case.eager(**case_copy(arguments))
    outputs = result if isinstance(result, tuple) else (result,)
    moved = float(bytes_of([*_tensors(arguments.values()), *_tensors(outputs)]))
    return Cost(flops, 2 * moved if mode == BACKWARD else moved)


def case_copy(arguments: dict[str, Any]) -> dict[str, Any]:
    """For functions that work in place."""
    return {k: [t.clone() for t in v] if isinstance(v, list) else v for k, v in arguments.items()}


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def rate(cost: Cost, seconds: float, ceilings: Ceilings | None) -> tuple[str, str]:
    """A rate as text, of operations or of bytes, whichever limit is nearer on this machine; its part of the ceiling."""
    product, copy = (ceilings.product, ceilings.copy) if ceilings else (1e14, 1e12)
    if cost.flops / product > cost.bytes / copy:
        speed, text = cost.flops / seconds, f"{cost.flops / seconds / 1e12:,.1f} TFLOP/s"
        return text, f"{speed / product:.0%}" if ceilings else ""
    speed = cost.bytes / seconds
    return f"{speed / 1e9:,.0f} GB/s", f"{speed / copy:.0%}" if ceilings else ""
