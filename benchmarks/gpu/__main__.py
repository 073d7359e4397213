"""python -m benchmarks.gpu: prove and measure the CUDA kernels on this machine's GPU, inside ten minutes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu import __doc__ as description
from benchmarks.gpu import proof, run


def budget(text: str) -> tuple[str, float]:
    """PART=SECONDS as a pair."""
    name, _, seconds = text.partition("=")
    if name not in [part.name for part in run.PARTS]:
        raise argparse.ArgumentTypeError(f"there is no part {name!r}")
    return name, float(seconds)


def main() -> int:
    names = [part.name for part in run.PARTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=description)
    parser.add_argument("--out", type=Path, default=run.ROOT / "benchmarks" / "results", help="folder of the reports")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--budget", nargs="+", default=[], type=budget, metavar="PART=SECONDS", help="of some parts")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--small-cases", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small_cases:
        print(f"{proof.small_cases()} ops have run")
    elif options.part is not None:
        run.run_part(next(p for p in run.PARTS if p.name == options.part), options.folder)
    else:
        budgets = dict(options.budget)
        chosen = [replace(p, seconds=budgets.get(p.name, p.seconds)) for p in run.PARTS if p.name in options.only]
        print("written:", *run.run(options.out, chosen, run.environment()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
