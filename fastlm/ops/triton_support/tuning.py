"""Measuring the candidate configurations on the GPU at hand, for `fastlm tune`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fastlm.ops.triton_support.config import Config
from fastlm.ops.triton_support.kernel import Example, Kernel, Recorder

REPEATS = 20  # launches that are timed together


@dataclass
class Choice:
    """A kernel and a problem, and the milliseconds of each candidate, by its index."""

    kernel: Kernel
    problem: Hashable
    candidates: Sequence[Config]
    times: dict[int, float] = field(default_factory=dict)

    def best(self) -> Config:
        return self.candidates[min(self.times, key=lambda i: self.times[i])]


class _Measuring(Recorder):
    """Takes the candidate of this index (the last where there are fewer), and times the launches with it."""

    def __init__(self, index: int, choices: dict[tuple, Choice], clock: Callable[[Callable[[], None]], float]) -> None:
        self.index, self.choices, self.clock = index, choices, clock
        self.asked: dict[tuple[Kernel, Config], Choice] = {}

    def choose(self, kernel: Kernel, problem: Hashable, candidates: Sequence[Config]) -> Config:
        choice = self.choices.setdefault((kernel, problem), Choice(kernel, problem, candidates))
        config = candidates[min(self.index, len(candidates) - 1)]
        self.asked[kernel, config] = choice
        return config

    def launch(self, kernel: Kernel, config: Config, grid: tuple[int, int, int], arguments: tuple) -> bool:
        choice = self.asked[kernel, config]
        if len(choice.candidates) > 1 and 0 not in grid:
            took = self.clock(lambda: kernel.start(config, grid, arguments))
            index = choice.candidates.index(config)
            choice.times[index] = min(took, choice.times.get(index, took))
        return False


def milliseconds(launch: Callable[[], None]) -> float:
    """The median over three turns of REPEATS launches, by the GPU's own clock."""
    launch()
    turns = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(REPEATS):
            launch()
        end.record()
        end.synchronize()
        turns.append(start.elapsed_time(end) / REPEATS)
    return statistics.median(turns)


def measure(
    examples: Iterable[Example], clock: Callable[[Callable[[], None]], float] = milliseconds
) -> Iterator[tuple[Example, list[Choice]]]:
    """For each example what there was to choose, with the time of every candidate. Kernels may run on their own
    results, over and over: only the time counts."""
    for example in examples:
        choices: dict[tuple, Choice] = {}
        index = 0
        while index == 0 or any(index < len(c.candidates) for c in choices.values()):
            Kernel.recorder = _Measuring(index, choices, clock)
            try:
                example.call()
            finally:
                Kernel.recorder = None
            index += 1
        yield example, [c for c in choices.values() if c.times]
