"""Compile every CUDA kernel for sm_80 and sm_90a and read from the machine code what can be known without a GPU.

Fails on a spill. Times are predictions at the chips' published limits, to be checked by `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import sys
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.kernels import chips, document, objects, sass, training_step, work
from benchmarks.kernels.chips import CHIPS
from benchmarks.kernels.objects import Kernel
from benchmarks.kernels.work import Recorded, Work


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels cuda", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--no-emulator", action="store_true", help="leave bank conflicts and dynamic shared memory out")
    parser.add_argument("--print", action="store_true", help="print the report, and write nothing")
    options = parser.parse_args(arguments)
    try:
        nvcc, cuobjdump = objects.tool("nvcc"), objects.tool("cuobjdump")
    except objects.Missing as error:
        print(error, file=sys.stderr)
        return 1
    recorded = {} if options.no_emulator else work.recorded()
    text = introduction()
    for arch in options.arch:
        kernels, loops, threads = compiled(arch, nvcc, cuobjdump)
        text += section(arch, kernels, loops, threads, recorded)
        spilled = [k for k in kernels if k.spills]
        if spilled:
            print("registers are spilled by:", *(k.symbol for k in spilled), sep="\n  ", file=sys.stderr)
            return 1
    if options.print or options.no_emulator or options.arch != list(CHIPS):
        print(text)
    else:
        document.replace_section("cuda", text)
        print(f"written to {document.PATH}")
    return 0


def compiled(arch: str, nvcc: str, cuobjdump: str) -> tuple[list[Kernel], dict[str, sass.Loop | None], dict[str, int]]:
    """The kernels of an architecture; the main loop, and the most threads of a block, by symbol."""
    kernels: list[Kernel] = []
    loops: dict[str, sass.Loop | None] = {}
    threads: dict[str, int] = {}
    for source in objects.sources(arch):
        target = objects.compile_one(source, arch, nvcc)
        log = target.with_suffix(".o.log").read_text()
        kernels += objects.kernels_of(log, arch, str(source.relative_to(objects.CSRC)))
        loops |= sass.dump(cuobjdump, target)
        threads |= sass.most_threads(cuobjdump, target)
        print(f"{arch}: {source.name}", file=sys.stderr, flush=True)
    return kernels, loops, threads


def introduction() -> str:
    rows = [
        (
            chip.name,
            chip.arch,
            chip.multiprocessors,
            f"{chip.tensor_flops / 1e12:.0f}",
            f"{chip.tf32_flops / 1e12:.0f}",
            f"{chip.mma_sync:.0%}",
            f"{chip.bandwidth / 1e12:.2f}",
            chip.source,
        )
        for chip in CHIPS.values()
    ]
    header = ("chip", "compiled for", "SMs", "bf16 TFLOP/s", "tf32 TFLOP/s", "by mma.sync", "memory TB/s", "source")
    return "Compiled, and in part emulated; nothing here was run on a GPU or measured.\n\n" + document.table(
        header, rows
    )


def section(
    arch: str,
    kernels: list[Kernel],
    loops: dict[str, sass.Loop | None],
    threads: dict[str, int],
    recorded: dict[str, Recorded],
) -> str:
    names = objects.demangled([k.symbol for k in kernels])
    text = f"\n### {arch}: every kernel\n\n{all_kernels(kernels, names, threads)}"
    works = work.all_work(arch)
    rows = [row_of(w, kernels, names, loops, threads, recorded) for w in works]
    loop_rows, predictions = [r[0] for r in rows], [r[1] for r in rows]
    header = (
        *("kernel", "threads", "shared memory, bytes", "blocks an SM", "occupancy", "loop"),
        *("tensor core", "LDSM", "LDGSTS", "float", "out of line"),
        *("tensor core busy, at most", "by shared memory", "wavefronts a matrix"),
    )
    text += f"\n### {arch}: main loops\n\n{document.table(header, loop_rows)}"
    header = ("kernel", "shape", "MB", "GFLOP", "limit", "predicted, at least")
    chip = CHIPS[arch]
    text += f"\n### {arch}: predictions for an {chip.name}, to be checked\n\n{document.table(header, predictions)}"
    return text + goals(chip, {w.kernel: seconds for w, seconds in zip(works, [r[2] for r in rows], strict=True)})


def goals(chip: chips.Chip, seconds: dict[str, float]) -> str:
    """What the predictions leave of the goals for an H100; nothing for another chip."""
    if chip is not chips.H100:
        return ""
    forward, *backward = work.attention("sm_90a")
    useful = 2.5 * forward.flops  # by convention: what is computed again does not count
    ways = [
        ("attention forward, d=128, causal, 8k, bf16", 320e12, forward.flops / seconds[forward.kernel]),
        ("attention backward, the same", 270e12, useful / sum(seconds[w.kernel] for w in backward)),
    ]
    product = work.fused_product()
    ways.append(
        (
            "GEMM + bias + GELU, 60 % of the tensor cores' rate",
            0.6 * chip.tensor_flops,
            product.flops / seconds[product.kernel],
        )
    )
    rows = [(name, f"{goal / 1e12:.0f}", f"{most / 1e12:.0f}", f"{goal / most:.0%}") for name, goal, most in ways]
    header = ("goal", "TFLOP/s wanted", "at most by the prediction", "the goal is of it")
    text = f"\n### {chip.arch}: goals against the predictions\n\n{document.table(header, rows)}"
    steps = document.table(("part", *training_step.WAYS), training_step.rows(chip))
    return f"{text}\n### {chip.arch}: a training step of GPT-2 124M, B=16, T=1024, bf16, at least, ms\n\n{steps}"


def all_kernels(kernels: list[Kernel], names: dict[str, str], threads: dict[str, int]) -> str:
    """A row for a kernel and element type, over all its other template arguments."""
    groups: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        name = names[kernel.symbol]
        dtype = re.search(r"<(bf16|f16|f32)", name)
        groups[name.partition("<")[0], dtype[1] if dtype else "-"].append(kernel)
    rows = []
    for (name, dtype), members in sorted(groups.items()):
        registers, shared = ([getattr(k, what) for k in members] for what in ("registers", "static_shared"))
        most = [threads[k.symbol] for k in members if k.symbol in threads]
        spills = max(k.spills for k in members)
        block = span(most) if most else "any"
        rows.append((f"`{name}`", dtype, len(members), span(registers), span(shared), block, spills))
    header = ("kernel", "type", "compiled", "registers", "static shared, bytes", "threads at most", "spills")
    return document.table(header, rows)


def row_of(
    w: Work,
    kernels: list[Kernel],
    names: dict[str, str],
    loops: dict[str, sass.Loop | None],
    threads: dict[str, int],
    recorded: dict[str, Recorded],
) -> tuple[tuple, tuple, float]:
    """The row of the main loop, that of the prediction, and its seconds."""
    matching = [k for k in kernels if fnmatch.fnmatchcase(names[k.symbol], w.kernel)]
    if not matching:
        raise ValueError(f"work.py names the kernel {w.kernel!r}, and none is called so")
    kernel = min(matching, key=lambda k: len(names[k.symbol]))
    chip, loop, name = CHIPS[kernel.arch], loops.get(kernel.symbol), f"`{names[kernel.symbol]}`"
    launch = recorded[w.op][w.launch] if w.op in recorded else {}
    block = launch.get("threads", threads.get(kernel.symbol, 256))
    shared = kernel.static_shared + launch.get("dynamic_shared", 0)
    blocks, occupied = chips.occupancy(chip, kernel.registers, block, shared)
    mix = ["none", "", "", "", "", ""] if loop is None else [loop.length, *(_share(loop, g) for g in MIX), _aside(loop)]
    matrices = launch.get("matrices", 0)
    conflicts = f"{launch['wavefronts'] / matrices:.2f}" if matrices else "-"
    products = loop.number("tensor core") if loop else 0
    wgmma = loop is not None and loop.wgmma_columns > 0
    busy, shared_busy = 1.0, 1.0
    if loop and wgmma:  # one instruction of a warp keeps its tensor core busy for columns / 2 cycles
        shared_busy = chips.wgmma_shared_limit(loop.wgmma_columns)
    elif loop and products:
        busy = chips.issue_limit(chip, products, loop.length)
        shared_busy = chips.shared_limit(chip, products, loop.wavefronts)
    seconds, limit = chips.roofline(chip, w.bytes, w.flops, w.tf32, busy, shared_busy, wgmma)
    flops = f"{w.flops / 1e9:,.0f}" if w.flops else "-"
    limits = (f"{busy:.0%}", f"{shared_busy:.0%}") if products else ("-", "-")
    prediction = (name, w.shape, f"{w.bytes / 1e6:,.0f}", flops, limit, f"{seconds * 1e6:,.0f} µs")
    return (
        (name, block, shared, blocks, f"{occupied:.0%}", *mix, *limits, conflicts),
        prediction,
        seconds,
    )


MIX = ("tensor core", "LDSM", "LDGSTS", "float")


def _share(loop: sass.Loop, group: str) -> str:
    number = loop.number(group)
    return f"{number} ({loop.share(group):.0%})" if number else "-"


def _aside(loop: sass.Loop) -> str:
    total = sum(loop.aside.values())
    copies = sum(loop.aside.get(op, 0) for op in sass.GROUPS["LDGSTS"])
    return f"{total}, {copies} LDGSTS" if total else "-"


def span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"
