"""python -m benchmarks.kernels triton, or cuda: compile every kernel for every architecture, record what came out."""

from __future__ import annotations

import sys

from benchmarks.kernels import cuda, triton

COMMANDS = {"cuda": cuda.main, "triton": triton.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(
            f"usage: python -m benchmarks.kernels {{{','.join(COMMANDS)}}} [options]; --help after the name says which"
        )
    sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
