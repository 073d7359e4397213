"""What Triton's kernels can reach on an H100, from their machine code: predictions, to be checked on a GPU.

A kernel with matrix products is bound from both sides by its main loop. At best other warps' instructions hide behind
the products, and the longer of the two counts; at worst nothing overlaps, and a pass takes the sum. Of the others the
memory's bandwidth is the limit.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels import chips, document, objects, sass, work

ARCH = "sm_90"
SPECIAL_CYCLES = 8  # of a scheduler for one MUFU of a warp: 16 results a cycle and multiprocessor
FROM_REGISTERS = re.compile(r"HGMMA\S+ R\d+, R\d+,")  # the left operand; else both are in shared memory


@dataclass(frozen=True)
class Work:
    """One kernel's part of an op: the example that launches it, and the bytes and operations that it cannot avoid."""

    example: str
    kernel: str
    shape: str
    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Pass:
    """Cycles of one pass of a main loop.

    Args:
        tensor: of the multiprocessor's tensor cores at their full rate.
        products: the same, or longer where a product waits for its operands from shared memory.
        instructions: of a scheduler, to issue all instructions of its warps.
    """

    tensor: float
    products: float
    instructions: float

    @property
    def busy(self) -> tuple[float, float]:
        """The share of the tensor cores' rate, at worst and at best."""
        return self.tensor / (self.products + self.instructions), self.tensor / max(self.products, self.instructions)


def all_work() -> list[Work]:
    forward, terms, *_ = work.attention("sm_80")
    product, shape = forward.flops / 2, forward.shape
    b, h, t, d = 2, 16, 8192, 128
    tensor, rows = 2.0 * b * h * t * d, 4.0 * b * h * t
    fused, m, n, k, vocab = work.fused_product(), 16384, 3072, 768, 50304
    norm, tokens = 2.0 * m * k, 4096
    attention, block = "attention 128 bfloat16 causal", "linear_act 4096 rows 768 gelu_tanh bfloat16"
    row, head = "layer_norm 768 bfloat16 residual bfloat16 bias", "linear_cross_entropy 2048x768x50304 bfloat16 mean"
    return [
        Work(attention, "attention.forward", shape, forward.bytes, 2 * product),
        Work(attention, "attention.row_terms", shape, terms.bytes),
        Work(attention, "attention.columns_backward", shape, 6 * tensor + 2 * rows, 4 * product),
        Work(attention, "attention.rows_backward", shape, 5 * tensor + 2 * rows, 3 * product),
        Work(block, "mlp.linear_act", fused.shape, fused.bytes, fused.flops),
        Work(
            block,
            "mlp.linear_act_backward",
            f"{m} x {k} by {k} x {n}, derivative of GELU, GELU, bias gradient",
            2.0 * (m * k + n * k + 3 * m * n),
            fused.flops,
        ),
        Work(
            head,
            "linear_cross_entropy.accumulate",
            f"{vocab} x {tokens} by {tokens} x {k}, into float32",
            2.0 * (tokens * vocab + tokens * k) + 8.0 * vocab * k,
            2.0 * tokens * vocab * k,
        ),
        Work(
            head, "linear_cross_entropy.softmax_loss", f"{tokens} x {vocab}, logits to gradients", 4.0 * tokens * vocab
        ),
        Work(row, "layer_norm.forward", f"{m} x {k}, residual", 4 * norm),
        Work(row, "layer_norm.backward", f"{m} x {k}, residual", 4 * norm),
    ]


def section() -> str:
    chip, seconds, rows = chips.H100, {}, []
    for w in all_work():
        config, loop = _compiled(w)
        if w.flops:
            assert loop is not None, f"{w.kernel} has no loop with wgmma"
            worst, best = (max(w.flops / (busy * chip.tensor_flops), w.bytes / chip.bandwidth) for busy in loop.busy)
            cycles = f"{loop.products:,.0f} and {loop.instructions:,.0f}"
            rates = f"{w.flops / worst / 1e12:,.0f} to {w.flops / best / 1e12:,.0f}"
        else:
            worst = best = w.bytes / chip.bandwidth
            cycles, rates = "-", "-"
        seconds[w.kernel] = worst, best
        time = f"{best * 1e6:,.0f}" if worst == best else f"{worst * 1e6:,.0f} to {best * 1e6:,.0f}"
        rows.append((f"`{w.kernel}` {config}", w.shape, f"{w.bytes / 1e6:,.0f}", cycles, rates, time))
    header = (
        *("kernel and configuration", "shape", "MB", "cycles a pass: products, instructions"),
        *("TFLOP/s", "at least, µs"),
    )
    text = f"\n### Triton, {ARCH}: predictions for an {chip.name}, to be checked\n\n{_legend()}"
    return f"{text}\n{document.table(header, rows)}\n{_goals(seconds)}"


def _legend() -> str:
    return (
        "From two numbers the first is with a block's products and its other instructions in turn, the second with all"
        " of it overlapped. What a kernel does before and after its main loop, and its"
        " waits for memory, come on top.\n"
    )


def _goals(seconds: dict[str, tuple[float, float]]) -> str:
    useful = work.attention("sm_80")[0].flops
    backward = [seconds[f"attention.{name}"] for name in ("row_terms", "columns_backward", "rows_backward")]
    rows = [
        ("attention forward, d=128, causal, 8k, bf16", 380, [useful / s for s in seconds["attention.forward"]]),
        # By convention 2.5 times the forward's operations: what is computed again does not count.
        ("attention backward, the same", 300, [2.5 * useful / sum(times) for times in zip(*backward, strict=True)]),
    ]
    table = [(name, goal, " to ".join(f"{rate / 1e12:.0f}" for rate in rates)) for name, goal, rates in rows]
    return document.table(("goal", "TFLOP/s wanted", "predicted"), table)


def _compiled(w: Work) -> tuple[str, Pass | None]:
    from fastlm.ops.triton_support import ahead

    launch = next(
        launch
        for launch in ahead.launches(ARCH, [w.example.partition(" ")[0]])
        if launch.example == w.example and launch.kernel.label == w.kernel
    )
    compiled = ahead.binary(launch, ARCH)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        command = [objects.tool("cuobjdump"), "-sass", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (instructions,) = sass.functions(text).values()
    return repr(launch.config), main_pass(instructions, launch.config.options()["num_warps"])


def main_pass(instructions: Sequence[tuple[int, str]], warps: int) -> Pass | None:
    """A pass of the loop with the most products, of equal ones the shortest: that without masks. None without any."""
    bodies = [
        [text for at, text in instructions if first <= at <= last and sass.opcode(text) != "NOP"]
        for first, last in sass.wgmma_loops(list(instructions))
    ]
    passes = [(_pass(body, warps), len(body)) for body in bodies]
    return max(passes, key=lambda p: (p[0].tensor, -p[1]))[0] if passes else None


def _pass(body: Sequence[str], warps: int) -> Pass:
    groups = warps // 4  # warpgroups, which make the products
    tensor, products = 0.0, 0.0
    for text in body:
        if match := sass.WGMMA.search(text):
            columns = int(match[1])
            from_shared = columns if FROM_REGISTERS.search(text) else 64 + columns  # rows of 32 bytes
            tensor += columns / 2 * groups
            products += max(columns / 2, from_shared * 32 / 128) * groups
    special = SPECIAL_CYCLES * sum(sass.opcode(text) == "MUFU" for text in body)
    return Pass(tensor, products, max(len(body), special) * warps / chips.SCHEDULERS)
