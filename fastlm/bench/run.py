"""The whole run of `fastlm bench`: what is measured, in which order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastlm.bench import ops, report
from fastlm.bench.memory import compare_memory
from fastlm.bench.overhead import compare_overhead
from fastlm.bench.plots import write_plots
from fastlm.bench.steps import SIZES, compare_generation, compare_training
from fastlm.bench.timing import Comparison

COMPILER = "torch.compile"


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        ops: names, or None for all.
        sizes: names of models in `fastlm.bench.steps.SIZES`.
        dtype: of the ops' inputs; of the models' matrix products, through autocast.
        rounds: at the most, of each comparison.
        seconds: how long a comparison may go on beginning rounds; three are made in any case.
        full: every benchmark case of every op.
        memory: the peak memory too.
        skip: peers to leave out.
    """

    ops: tuple[str, ...] | None
    sizes: tuple[str, ...]
    dtype: str
    device: str
    rounds: int = 9
    seconds: float = 5.0
    full: bool = False
    memory: bool = True
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for size in self.sizes:
            if size not in SIZES:
                raise ValueError(f"there is no size {size!r}; the sizes are: {', '.join(SIZES)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {self.device!r}, but torch sees no CUDA GPU")


def run(options: Options, out: Path, console: Console) -> list[Comparison]:
    """Measure, print a table of each comparison as it comes, and leave report.json and the pictures in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    where = report.environment()
    report.print_environment(console, where)
    comparisons: list[Comparison] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compilers and other libraries talk much; what matters is in the report
        for comparison in _comparisons(options):
            comparisons.append(comparison)
            report.progress("")
            console.print(report.table(comparison))
            report.write_json(out / "report.json", where, asdict(options), comparisons)
    missing = report.absent(comparisons)
    if missing is not None:
        console.print(missing)
    pictures = write_plots(out, comparisons, where)
    console.print(f"Written: {', '.join(str(p) for p in (out / 'report.json', *pictures))}", highlight=False)
    return comparisons


def _comparisons(options: Options) -> Iterator[Comparison]:
    dtype, device, skip = getattr(torch, options.dtype), options.device, set(options.skip)
    timing: tuple[Any, ...] = (options.rounds, options.seconds, skip)
    cases = ops.cases(None if options.ops is None else list(options.ops), options.full)
    if cases:
        report.progress("overhead of a call")
        yield from compare_overhead()
    for case in cases:
        report.progress(f"{case}, {options.dtype}")
        yield from ops.compare(case, dtype, device, *timing)
    for name in options.sizes:
        report.progress(f"training {name}")
        yield compare_training(SIZES[name], dtype, device, *timing)
        report.progress(f"generation {name}")
        yield compare_generation(SIZES[name], dtype, device, *timing)
        if options.memory:
            report.progress(f"memory of training {name}")
            yield compare_memory(name, dtype, device, skip)
