"""Compile every Triton kernel in every configuration that it can choose, for every architecture, without a GPU.

Fails on a spill, on more shared memory than there is, and where a kernel that must use the tensor cores or the TMA of a
Hopper GPU does not. What came out is kept in benchmarks/kernels/triton.json after every kernel, so that the command
goes on where it was interrupted and compiles only what was changed. When all is there, it writes docs/kernels.md.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.kernels import document, record, triton_predictions

# kernel -> instructions that its code for sm_90 must have, in each configuration with tensor descriptors
HOPPER = ("wgmma.mma_async", "cp.async.bulk.tensor")


# sm_86 takes the tiles of sm_80 for the most part; `--arch sm_86` compiles it too.
RECORDED = ["sm_80", "sm_90", "sm_100", "gfx942"]


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if os.environ.pop("TRITON_INTERPRET", None):
        print("TRITON_INTERPRET is left aside: it would keep Triton from compiling")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        return _check(options) if options.check else _renew(options)


def _parser() -> argparse.ArgumentParser:
    from fastlm.ops.triton_support.target import ARCHITECTURES

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels triton",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=RECORDED)
    parser.add_argument("--op", nargs="+", default=[], help="only these ops")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--check", action="store_true", help="hold the record to the kernels; write nothing")
    parser.add_argument("--verbose", action="store_true", help="a line for each kernel that was compiled")
    return parser


def _renew(options: argparse.Namespace) -> int:
    """Compile what the record lacks, storing each result at once."""
    from fastlm.ops.triton_support import ahead

    known = record.load()
    wanted, failures = [], []
    for arch in options.arch:
        launches = list(ahead.launches(arch, options.op))
        missing = [launch for launch in launches if not known.has(arch, launch)]
        print(f"{arch}: {len(launches)} kernels, {len(missing)} to compile", flush=True)
        wanted += [(arch, *launch.identity) for launch in launches]
        for done in ahead.compile_all(missing, arch, options.jobs):
            problem = done.problem() or lacks(done)
            if problem:
                failures.append(f"{arch} {done.kernel} ({done.config}), {done.example}: {problem}")
            else:
                known.add(done)
            if problem or options.verbose:
                line = f"  {done.kernel} ({done.config}) {done.example}: {done.registers} registers, {done.shared} B"
                print(f"{line} {problem or ''}", flush=True)
    if failures:
        print(f"{len(failures)} kernels must not be used:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    complete = not options.op and options.arch == RECORDED
    if complete:
        known.keep(wanted)
        document.replace_section("triton", report(known.kernels.values(), known.triton) + triton_predictions.section())
    print(f"{len(wanted)} kernels, no spills" + (f"; written to {document.PATH.name}" if complete else ""))
    return 0


def _check(options: argparse.Namespace) -> int:
    """The record is of these very kernels; and the first launch of each kernel is compiled again, and compared."""
    from fastlm.ops.triton_support import ahead

    known, failures, count = record.load(), [], 0
    for arch in options.arch:
        launches = list(ahead.launches(arch, options.op))
        for launch in launches:
            if not known.has(arch, launch, any_version=True):
                failures.append(f"{arch} {launch.kernel.label} ({launch.config}), {launch.example}: not in the record")
        names = {(arch, *launch.identity) for launch in launches}
        for done in known.kernels.values():
            if done.problem() or lacks(done):
                failures.append(f"{arch} {done.kernel} ({done.config}): {done.problem() or lacks(done)}")
            if done.arch == arch and not options.op and record.name(done) not in names:
                failures.append(
                    f"{arch} {done.kernel} ({done.config}), {done.example}: in the record, but no more chosen"
                )
        sample = {launch.kernel: launch for launch in reversed(launches)}.values()
        for done in ahead.compile_all(list(sample), arch, options.jobs):
            count += 1
            recorded = known.kernels.get(record.name(done))
            problem = done.problem() or lacks(done)
            if problem is None and recorded is not None and known.same_compiler() and recorded != done:
                problem = f"compiled to {done}, the record has {recorded}"
            if problem:
                failures.append(f"{arch} {done.kernel} ({done.config}), {done.example}: {problem}")
    if failures:
        advice = "run `python -m benchmarks.kernels triton`, and commit what it writes"
        print(f"{len(failures)} complaints; {advice}:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    print(f"the record holds every kernel; {count} were compiled: no spills")
    return 0


def lacks(done: Any) -> str | None:
    """None, or which of Hopper's instructions a kernel with tensor descriptors lacks. Its matrix instruction multiplies
    64 rows or more."""
    if done.arch != "sm_90" or not done.descriptors:
        return None
    few = re.search(r"\bBM (16|32)\b", done.config)
    missing = [name for name in (HOPPER[1:] if few else HOPPER) if name not in done.instructions]
    return f"lacks {' and '.join(missing)}" if missing else None


def report(compiled: Iterable[Any], version: str) -> str:
    """A table an architecture: a row for a kernel and configuration, over all of its examples."""
    text = f"Compiled by Triton {version}; nothing here was run or measured.\n"
    groups: dict[str, dict[tuple[str, str], list]] = defaultdict(lambda: defaultdict(list))
    for done in compiled:
        groups[done.arch][done.kernel, done.config].append(done)
    for arch, kernels in groups.items():
        rows = []
        for (kernel, config), members in sorted(kernels.items(), key=lambda item: _natural(" ".join(item[0]))):
            instructions = sorted({i.partition(".")[0] for m in members for i in m.instructions})
            columns = ([getattr(m, name) for m in members] for name in ("registers", "shared", "spilled"))
            rows.append((f"`{kernel}` {config}", len(members), *map(_range, columns), " ".join(instructions) or "-"))
        header = (
            "kernel and configuration",
            "compiled",
            "registers",
            "shared memory, bytes",
            "spilled",
            "instructions",
        )
        text += f"\n### Triton, {arch}\n\n{document.table(header, rows)}"
    return text


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _natural(text: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
