"""Layer norm and RMS norm in Triton."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.ops.native import rows
from fastlm.ops.triton_support import Config, Example, Kernel, cdiv, multiprocessors, next_power_of_2
from fastlm.ops.triton_support.column_sum import column_sum

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8192  # a row stays in the registers of one program, in the backward pass with two sums beside it


@functools.cache
def _candidates(arch: str, problem: tuple[int, bool]) -> tuple[Config, ...]:
    """Tiles of at least 1024 elements, eight (16 bytes in half precision) a thread; from 4096 on more warps, as rows
    that span many threads cost more to sum up than to load. The backward pass also carries two sums a column."""
    block, backward = problem
    least = 2048 if backward else 1024
    tile = max(least, block)
    threads = 64 if arch.startswith("gfx") else 32
    warps = min(16, max(1, tile // (8 * threads)))
    if backward and block <= 64:
        warps //= 2  # with more, sm_80's registers spill
    best = Config(BLOCK=block, ROWS=tile // block, num_warps=warps)
    half = Config(BLOCK=block, ROWS=tile // block, num_warps=max(1, warps // 2))
    taller = Config(BLOCK=block, ROWS=2 * tile // block, num_warps=warps)
    if block > 4096:
        return (best,)
    return best, half, taller


FORWARD = Kernel("fastlm.ops.layer_norm.triton_kernels:forward", _candidates)
BACKWARD = Kernel("fastlm.ops.layer_norm.triton_kernels:backward", _candidates)


def unsupported(x, weight, bias, residual, eps, rms) -> str | None:
    for t in (x, weight, residual):
        if t is not None and t.dtype not in FLOATS:
            return f"its kernels are for float32, bfloat16 and float16, got {t.dtype}"
    if x.shape[-1] > WIDEST:
        return f"its kernels are for widths up to {WIDEST:,}, got {x.shape[-1]}"
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    *leading, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    statistics = x.new_empty((1 if rms else 2, *leading), dtype=torch.float32)  # rstd; mean and rstd
    x, x_stride = rows(x)
    if residual is None:
        h, residual_stride = x.new_empty(0), 0
    else:
        h = torch.empty_like(residual, memory_format=torch.contiguous_format)
        residual, residual_stride = rows(residual)
    count = statistics[0].numel()
    config = FORWARD.config(x.device, (next_power_of_2(width), False))
    FORWARD(
        config,
        (cdiv(count, config["ROWS"]), 1, 1),
        x,
        residual,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        None if residual is None else h,
        None if rms else statistics[0],
        statistics[-1],
        count,
        width,
        x_stride,
        residual_stride,
        eps,
    )
    return y, h, statistics


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    statistics: Tensor,
    has_bias: bool,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, count = dy.shape[-1], statistics[0].numel()
    dx = dy.new_empty(dy.shape)
    dresidual = h.new_empty(h.shape if h.dtype != dy.dtype else 0)
    make = weight.new_empty if count else weight.new_zeros
    dweight, dbias = make(width), make(width if has_bias else 0)
    if count == 0:
        return dx, dresidual, dweight, dbias
    config = BACKWARD.config(dy.device, (next_power_of_2(width), True))
    # Each program goes through its share of the rows and leaves its sums; two a multiprocessor hide each other's waits.
    programs = min(cdiv(count, config["ROWS"]), 2 * multiprocessors(dy.device))
    partial = statistics.new_empty(1 + has_bias, programs, width)
    dy, dy_stride = rows(dy)
    h, h_stride = rows(h)
    dh_stride = 0
    if dh is not None:
        dh, dh_stride = rows(dh)
    BACKWARD(
        config,
        (programs, 1, 1),
        dy,
        dh,
        h,
        weight.contiguous(),
        None if rms else statistics[0],
        statistics[-1],
        dx,
        dresidual if dresidual.numel() else None,
        partial[0],
        partial[1] if has_bias else None,
        count,
        width,
        dy_stride,
        dh_stride,
        h_stride,
    )
    column_sum(partial, dweight, dbias if has_bias else None)
    return dx, dresidual, dweight, dbias


def examples(device: torch.device) -> Iterator[Example]:
    """GPT-2's, Llama's and the widest rows; what makes other code: dtypes, a residual (wider or not), bias, RMS."""
    for width in (64, 768, 1600, 4096, WIDEST):
        yield _example(device, width, torch.float32, torch.float32, True, False)
    for width in (768, WIDEST):
        yield _example(device, width, torch.bfloat16, torch.bfloat16, True, False)
        yield _example(device, width, torch.bfloat16, torch.float32, False, True)
        yield _example(device, width, torch.bfloat16, None, False, True)
    yield _example(device, 777, torch.float16, None, True, False)


def _example(
    device: torch.device, width: int, dtype: torch.dtype, residual: torch.dtype | None, bias: bool, rms: bool
) -> Example:
    def call() -> None:
        x = torch.ones(4096, width, dtype=dtype, device=device)
        weight = torch.ones(width, dtype=dtype, device=device)
        added = None if residual is None else x.to(residual)
        y, h, statistics = forward(x, weight, weight if bias else None, added, 1e-5, rms)
        backward(y, None if added is None else h, x if added is None else h, weight, statistics, bias, rms)

    name = f"{width} {dtype} residual {residual}{' bias' if bias else ''}{' RMS' if rms else ''}"
    return Example(name.replace("torch.", ""), call)
