"""Where the time of a training step on the CPU goes: the library's products, our kernels by name, and all else.

    python -m benchmarks.step_profile --sizes char,gpt2

Times are of the calling thread (torch.profiler), medians over the steps.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastlm.bench.steps import SIZES, Trainer
from fastlm.ops import native

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"}
OURS = "fastlm::"


class Recorded:
    """fastlm._C, its functions under their names in the profile."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if not callable(value):
            return value

        def call(*arguments: Any) -> Any:
            with record_function(OURS + name):
                return value(*arguments)

        setattr(self, name, call)
        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="char,gpt2", help=f"with commas between: {', '.join(SIZES)}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    native.C = Recorded(native.C)
    for name in options.sizes.split(","):
        _report(name, getattr(torch, options.dtype), options.steps)


def _report(name: str, dtype: torch.dtype, steps: int) -> None:
    trainer = Trainer("fastlm", SIZES[name], dtype, "cpu")
    for _ in range(2):
        trainer.step()
    seconds = [_profiled(trainer) for _ in range(steps)]
    total = statistics.median(sum(s.values()) for s in seconds)
    print(f"{SIZES[name]}, {str(dtype).removeprefix('torch.')}: {1e3 * total:.0f} ms")
    medians = {key: statistics.median(s[key] for s in seconds) for key in set().union(*seconds)}
    for key, value in sorted(medians.items(), key=lambda item: -item[1]):
        if value > 0.003 * total:
            print(f"  {100 * value / total:5.1f} %  {key}")


def _profiled(trainer: Trainer) -> Counter[str]:
    """Seconds of one step."""
    with profile(activities=[ProfilerActivity.CPU]) as run, record_function("step"):
        trainer.step()
    seconds: Counter[str] = Counter()
    for event in run.key_averages():
        ours = event.key.startswith(OURS)
        known = event.key.removeprefix(OURS) if ours else "the library's products" if event.key in PRODUCTS else None
        seconds[known or "all else"] += 1e-6 * event.self_cpu_time_total
    return seconds


if __name__ == "__main__":
    main()
