"""Interleaved timing: every peer once a round, ratios within the round."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

BASELINE = "eager"  # the peer that all others are compared to: PyTorch as a textbook writes it


@dataclass
class Result:
    """One peer's part in a comparison.

    Args:
        peer: its name.
        seconds: for each round the time of one call.
        error: how far its numbers are from the reference's, relative (see `ops.py` and `steps.py`).
        peak_bytes: the most memory that was in use at once (`memory.py` says whose), or None where not measured.
        reason: why it was not measured, or None.
        extra: more numbers, by name.
    """

    peer: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    peak_bytes: int | None = None
    reason: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass
class Comparison:
    """The same work done by several peers in one run."""

    group: str  # "op", "lstm", "step", "generation", "overhead", "memory"
    name: str  # what was done: an op and its case, a model and its batch
    mode: str  # "forward", "forward+backward", "step", "greedy", "peak memory"
    dtype: str
    results: list[Result]

    def speedup(self, result: Result) -> tuple[float, float, float] | None:
        """How many times as fast as the baseline: the quartiles of the ratios of one round, median first."""
        base = next((r for r in self.results if r.peer == BASELINE), None)
        if base is None or not base.seconds or not result.seconds:
            return None
        ratios = [b / s for b, s in zip(base.seconds, result.seconds, strict=True)]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high


def synchronize() -> None:
    """Wait for the GPU, where there is one: a call returns before its kernels have run."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], repeats: int = 1) -> float:
    """The time of one of `repeats` calls in a row."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


# A sample shorter than this measures the clock and the scheduler as much as the call.
SHORTEST_SAMPLE = 5e-3


def interleave(calls: dict[str, Callable[[], Any]], rounds: int, budget: float = math.inf) -> dict[str, Result]:
    """Time the calls in turns: one sample each a round.

    Args:
        calls: by peer. Each is called twice first (compilers compile, allocators fill). Short ones, of which a sample
            has several, are called as often before each sample, untimed: the first calls after another peer's find
            the caches full of that peer's data (a last-level cache makes room over half a dozen calls), and would
            weigh the more, the fewer calls a sample has.
        rounds: how many samples of each are wanted.
        budget: the seconds after which no further round begins; three rounds are made in any case.

    Returns:
        For each peer its times, or the reason why it failed; the rest goes on without it.
    """
    results = {name: Result(name) for name in calls}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        try:
            call()
            repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(seconds_of(call), 1e-7)))
        except Exception as error:
            results[name].reason = reason_of(error)
    names = list(repeats)
    gc.collect()
    start = time.perf_counter()
    for done in range(rounds):
        if done >= min(3, rounds) and time.perf_counter() - start > budget:
            break
        # every other round backwards: nobody always comes after the same peer
        for name in names if done % 2 == 0 else names[::-1]:
            if repeats[name] > 1:
                for _ in range(repeats[name]):
                    calls[name]()
            results[name].seconds.append(seconds_of(calls[name], repeats[name]))
    return results


def reason_of(error: BaseException) -> str:
    """The first line of an error, short enough for a table."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."
