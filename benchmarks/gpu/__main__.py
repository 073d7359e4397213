"""python -m benchmarks.gpu: prove and measure the CUDA kernels on this machine's GPU, inside ten minutes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu import __doc__ as description
from benchmarks.gpu import proof, run


def main() -> int:
    names = [part.name for part in run.PARTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=description)
    parser.add_argument("--out", type=Path, default=run.ROOT / "benchmarks" / "results", help="folder of the reports")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--small-cases", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small_cases:
        print(f"{proof.small_cases()} ops have run")
    elif options.part is not None:
        run.run_part(next(p for p in run.PARTS if p.name == options.part), options.folder)
    else:
        chosen = [part for part in run.PARTS if part.name in options.only]
        print("written:", *run.run(options.out, chosen, run.environment()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
