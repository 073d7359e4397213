"""Compile every Triton kernel in every configuration that it can choose, for every architecture, without a GPU.

Fails on a spill, on more shared memory than there is, and where a kernel that must use the tensor cores or the TMA of a
Hopper GPU does not.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.kernels import document

# kernel -> instructions that its code for sm_90 must have, in each configuration with tensor descriptors
HOPPER = ("wgmma.mma_async", "cp.async.bulk.tensor")


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if os.environ.pop("TRITON_INTERPRET", None):
        print("TRITON_INTERPRET is left aside: it would keep Triton from compiling")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        return _run(options)


def _parser() -> argparse.ArgumentParser:
    from fastlm.ops.triton_support.target import ARCHITECTURES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels triton", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--op", nargs="+", default=[], help="only these ops (then nothing is recorded)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--verbose", action="store_true", help="a line for each kernel that was compiled")
    return parser


def _run(options: argparse.Namespace) -> int:
    from fastlm.ops.triton_support import ahead

    compiled, failures = [], []
    for arch in options.arch:
        launches = list(ahead.launches(arch, options.op))
        print(f"{arch}: {len(launches)} kernels", flush=True)
        for done in ahead.compile_all(launches, arch, options.jobs):
            compiled.append(done)
            problem = done.problem() or _missing(done)
            if problem:
                failures.append(f"{arch} {done.kernel} ({done.config}), {done.example}: {problem}")
            if problem or options.verbose:
                line = f"  {done.kernel} ({done.config}) {done.example}: {done.registers} registers, {done.shared} B"
                print(f"{line} {problem or ''}", flush=True)
    if failures:
        print(f"{len(failures)} of {len(compiled)} kernels must not be used:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    complete = not options.op and options.arch == _parser().parse_args([]).arch
    if complete:
        document.replace_section("triton", report(compiled))
    print(f"{len(compiled)} kernels, no spills" + (f"; written to {document.PATH.name}" if complete else ""))
    return 0


def _missing(done) -> str | None:
    """None, or which of Hopper's instructions a kernel with tensor descriptors lacks. Its matrix instruction multiplies
    64 rows or more."""
    if done.arch != "sm_90" or not done.descriptors:
        return None
    few = re.search(r"\bBM (16|32)\b", done.config)
    missing = [name for name in (HOPPER[1:] if few else HOPPER) if name not in done.instructions]
    return f"lacks {' and '.join(missing)}" if missing else None


def report(compiled: Sequence) -> str:
    """A table an architecture: a row for a kernel and configuration, over all of its examples."""
    import triton

    text = f"Compiled by Triton {triton.__version__}; nothing here was run or measured.\n"
    groups: dict[str, dict[tuple[str, str], list]] = defaultdict(lambda: defaultdict(list))
    for done in compiled:
        groups[done.arch][done.kernel, done.config].append(done)
    for arch, kernels in groups.items():
        rows = []
        for (kernel, config), members in sorted(kernels.items(), key=lambda item: _natural(" ".join(item[0]))):
            instructions = sorted({i.partition(".")[0] for m in members for i in m.instructions})
            registers = _range([m.registers for m in members])
            shared = _range([m.shared for m in members])
            rows.append((f"`{kernel}` {config}", len(members), registers, shared, " ".join(instructions) or "-"))
        header = ("kernel and configuration", "compiled", "registers", "shared memory, bytes", "instructions")
        text += f"\n### {arch}\n\n{document.table(header, rows)}"
    return text


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _natural(text: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
