"""linear_cross_entropy in Triton: blocks of logits by PyTorch's library, their loss and gradient by one kernel, in
place, and in half precision the weight's gradient by a product that adds up in float32.

Nothing waits for the device: ignored rows are passed over inside the kernel, and the mean's divisor stays there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.ops import memory
from fastlm.ops.checks import autocast_off
from fastlm.ops.linear_cross_entropy.reference import check_targets
from fastlm.ops.triton_support import FLOATS, Config, Example, Kernel, architecture, gemm, next_power_of_2

# Bytes of one block of logits, all the memory there is beside the gradients. Each block reads and writes the weight's
# gradient in float32 once: with 50,257 classes of width 768 a block of 96 MB (1,000 rows) does 77 GFLOP a product for
# 310 MB of that traffic, about a third of their time on an H100's data sheet; with half the block it is the half.
BLOCK_BYTES = 96 << 20
MAX_ROWS = 8192


@functools.cache
def _rows_candidates(arch: str, problem: tuple[int]) -> tuple[Config, ...]:
    """Eight elements a thread in half precision, 16 bytes: up to 4096 columns of a row at a time; on sm_100 half of
    it, as 16 warps' registers there spill."""
    block = min(problem[0], 2048 if arch == "sm_100" else 4096)
    lanes = 64 if arch.startswith("gfx") else 32
    warps = max(1, min(16, block // (8 * lanes)))
    return (Config(BLOCK=block, num_warps=warps), Config(BLOCK=block, num_warps=max(1, warps // 2)))


MODULE = "fastlm.ops.linear_cross_entropy.triton_kernels"
SOFTMAX_LOSS = Kernel(f"{MODULE}:softmax_loss", _rows_candidates)
ACCUMULATE = Kernel(f"{MODULE}:accumulate", gemm.tiles)


def unsupported(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    if x.dtype not in FLOATS:
        return f"its kernels are for float32, bfloat16 and float16, got {x.dtype}"
    if max(weight.shape) >= 2**31:
        return f"its kernels are for fewer than 2^31 classes, got {tuple(weight.shape)}"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_targets(targets, len(weight), ignore_index)  # on the CPU only
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1).contiguous()
    loss = rows.new_empty(len(rows), dtype=torch.float32)
    lse = torch.empty_like(loss)
    makes = [need and reduction != "none" for need in needs]
    count = (flat != ignore_index).sum(dtype=torch.float32).view(1) if reduction == "mean" else None
    # A mean over no row is NaN, its gradient zero: 1 / max(N, 1).
    divisor = count.clamp(min=1.0) if count is not None and any(makes) else None
    options = ignore_index, label_smoothing, z_loss, softcap
    dx, dweight = _run(rows, weight, flat, loss, lse, None, divisor, options, makes)
    if reduction == "none":
        losses, lses = (memory.reshaped(t, *targets.shape) for t in (loss, lse))
        return losses, lses, dx, dweight
    total = loss.sum(dtype=torch.float64)
    if count is not None:
        total = total / count[0]
    return total.float(), lse.new_empty(0), dx.view(x.shape) if makes[0] else dx, dweight


def backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1).contiguous()
    options = ignore_index, label_smoothing, z_loss, softcap
    dx, dweight = _run(rows, weight, flat, None, lse.reshape(-1), dloss.reshape(-1), None, options, needs)
    return dx.view(x.shape) if needs[0] else dx, dweight


def _run(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: Tensor | None,
    lse: Tensor,
    dloss: Tensor | None,
    divisor: Tensor | None,
    options: tuple[int, float, float, float],
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """dx and dweight (float32; empty where not needed), block by block. With `loss`, loss and lse are written."""
    (count, width), vocabulary = rows.shape, len(weight)
    exact = rows.dtype == torch.float32
    dx = rows.new_empty((count, width) if needs[0] else 0, dtype=torch.float32)
    make = weight.new_empty if count else weight.new_zeros
    dweight = make((vocabulary, width) if needs[1] else 0, dtype=torch.float32)
    step = max(1, min(MAX_ROWS, BLOCK_BYTES // (vocabulary * rows.element_size()) // 16 * 16 or 16))
    buffer = rows.new_empty(min(step, count), vocabulary)
    config = SOFTMAX_LOSS.config(rows.device, (next_power_of_2(vocabulary),))
    ignore_index, smoothing, z_loss, softcap = options
    with autocast_off(rows):
        for start in range(0, count, step):
            block = slice(start, min(start + step, count))
            x = rows[block]
            logits = torch.mm(x, weight.T, out=buffer[: len(x)])
            SOFTMAX_LOSS(
                config,
                (len(x), 1, 1),
                logits,
                targets[block],
                None if dloss is None else dloss[block],
                divisor if exact else None,  # in half precision 1 / N would be lost: it goes to the sums
                None if loss is None else loss[block],
                lse[block],
                vocabulary,
                0 if dloss is None else dloss.stride(0),
                ignore_index,
                smoothing,
                z_loss,
                softcap,
                softcap > 0,
                any(needs),
            )
            if needs[0] and exact:
                torch.mm(logits, weight, out=dx[block])
            elif needs[0]:
                dx[block] = torch.mm(logits, weight)
            if needs[1] and not exact:
                _accumulate(logits, x, dweight, divisor, start == 0)
            elif needs[1] and start == 0:
                torch.mm(logits.T, x, out=dweight)
            elif needs[1]:
                dweight.addmm_(logits.T, x)
        if divisor is not None and needs[0] and not exact:
            dx.div_(divisor)
    return dx, dweight


def _accumulate(dlogits: Tensor, x: Tensor, dweight: Tensor, divisor: Tensor | None, first: bool) -> None:
    """dweight (+)= dlogits.T @ x / divisor."""
    if x.stride(1) != 1:
        x = x.contiguous()
    (k, m), n = dlogits.shape, x.shape[1]
    reading = gemm.reading(architecture(x.device), dlogits, x)
    config = ACCUMULATE.config(x.device, (gemm.height(m), 2, reading))
    bm, bn, bk, described = config["BM"], config["BN"], config["BK"], config["TMA"]
    ACCUMULATE(
        config,
        gemm.grid(config, m, n),
        gemm.describe(dlogits, [bk, bm]) if described else dlogits,
        gemm.describe(x, [bk, bn]) if described else x,
        dweight,
        divisor,
        m,
        n,
        k,
        dlogits.stride(0),
        x.stride(0),
        int(first),
        described,  # else there are masks, lest another number of rows be another kernel
    )


def examples(device: torch.device) -> Iterator[Example]:
    """GPT-2's head, one of 65 characters, and what makes other code: the options, the reductions, float32."""
    everything = (0.1, 1e-4, 30.0)
    yield _example(device, torch.bfloat16, (2048, 768, 50304), "mean", (0.0, 0.0, 0.0))
    yield _example(device, torch.bfloat16, (2048, 767, 50257), "sum", everything)
    yield _example(device, torch.bfloat16, (2048, 768, 50304), "none", everything)
    yield _example(device, torch.float16, (2048, 384, 65), "mean", everything)
    yield _example(device, torch.float32, (2048, 768, 50304), "mean", (0.0, 0.0, 0.0))
    yield _example(device, torch.float32, (2048, 768, 50257), "none", everything)


def _example(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    reduction: str,
    options: tuple[float, float, float],
) -> Example:
    rows, width, vocabulary = sizes

    def call() -> None:
        x = torch.ones(rows, width, dtype=dtype, device=device)
        weight = torch.ones(vocabulary, width, dtype=dtype, device=device)
        targets = torch.zeros(rows, dtype=torch.int64, device=device)
        _, lse, _, _ = forward(x, weight, targets, reduction, -100, *options, [True, True])
        if reduction == "none":
            backward(lse, x, weight, targets, lse, -100, *options, [True, True])
        else:
            forward(x, weight, targets, reduction, -100, *options, [False, False])

    name = f"{rows}x{width}x{vocabulary} {dtype} {reduction}{' all options' if any(options) else ''}"
    return Example(name.replace("torch.", ""), call)
