"""Layer norm and RMS norm in Triton.

Rows of up to 8,192 stay in registers; the kernels for wider ones go through them in blocks, more than once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.ops.native import rows
from fastlm.ops.triton_support import FLOATS, Config, Example, Kernel, cdiv, multiprocessors, next_power_of_2
from fastlm.ops.triton_support.column_sum import column_sum

IN_REGISTERS = 8192  # the widest row that one program can hold, in the backward pass with two sums beside it
WIDEST = 2**30  # columns are counted in 32 bits


@functools.cache
def _candidates(arch: str, problem: tuple[int, bool]) -> tuple[Config, ...]:
    """Tiles of at least 1024 elements, eight (16 bytes in half precision) a thread; from 4096 on more warps, as rows
    that span many threads cost more to sum up than to load. The backward pass also carries two sums a column."""
    block, backward = problem
    if block > IN_REGISTERS:
        return (Config(BLOCK=2048, ROWS=1, num_warps=8),)
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


@functools.cache
def _columns(arch: str, problem: tuple) -> tuple[Config, ...]:
    # 512 bytes a row in half precision; 16 elements a thread, and two sums of each
    return (Config(BLOCK=256, ROWS=8, num_warps=4),)


FORWARD_WIDE = Kernel("fastlm.ops.layer_norm.triton_wide_kernels:forward_wide", _candidates)
BACKWARD_WIDE = Kernel("fastlm.ops.layer_norm.triton_wide_kernels:backward_wide", _candidates)
WEIGHTS_BACKWARD_WIDE = Kernel("fastlm.ops.layer_norm.triton_wide_kernels:weights_backward_wide", _columns)


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
    kernel = FORWARD if width <= IN_REGISTERS else FORWARD_WIDE
    config = kernel.config(x.device, (_block(width), False))
    kernel(
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
    launch = _backward_in_registers if width <= IN_REGISTERS else _backward_wide
    mean, rstd = None if rms else statistics[0], statistics[-1]
    partial = launch(
        rows(dy),
        (None, 0) if dh is None else rows(dh),
        rows(h),
        (weight.contiguous(), mean, rstd),
        (dx, dresidual if dresidual.numel() else None),
        has_bias,
    )
    column_sum(partial, dweight, dbias if has_bias else None)
    return dx, dresidual, dweight, dbias


def _backward_in_registers(dy_rows, dh_rows, h_rows, given, made, has_bias: bool) -> Tensor:
    """Each program goes through its share of the rows and leaves the sums of its weights' gradients."""
    (dy, dy_stride), (dh, dh_stride), (h, h_stride) = dy_rows, dh_rows, h_rows
    width, count = dy.shape[-1], given[-1].numel()
    config = BACKWARD.config(dy.device, (_block(width), True))
    # two programs a multiprocessor hide each other's waits
    programs = min(cdiv(count, config["ROWS"]), 2 * multiprocessors(dy.device))
    partial = dy.new_empty(1 + has_bias, programs, width, dtype=torch.float32)
    sums, strides = (partial[0], partial[1] if has_bias else None), (dy_stride, dh_stride, h_stride)
    BACKWARD(config, (programs, 1, 1), dy, dh, h, *given, *made, *sums, count, width, *strides)
    return partial


def _backward_wide(dy_rows, dh_rows, h_rows, given, made, has_bias: bool) -> Tensor:
    """Rows that are read twice, then the weights' gradients down the columns."""
    (dy, dy_stride), (dh, dh_stride), (h, h_stride) = dy_rows, dh_rows, h_rows
    width, count = dy.shape[-1], given[-1].numel()
    config = BACKWARD_WIDE.config(dy.device, (_block(width), True))
    grid, strides = (cdiv(count, config["ROWS"]), 1, 1), (dy_stride, dh_stride, h_stride)
    BACKWARD_WIDE(config, grid, dy, dh, h, *given, *made, count, width, *strides)
    config = WEIGHTS_BACKWARD_WIDE.config(dy.device, ())
    blocks = cdiv(width, config["BLOCK"])
    parts = min(cdiv(count, config["ROWS"]), cdiv(8 * multiprocessors(dy.device), blocks))
    partial = dy.new_empty(1 + has_bias, parts, width, dtype=torch.float32)
    sums, statistics = (partial[0], partial[1] if has_bias else None), given[1:]
    WEIGHTS_BACKWARD_WIDE(config, (blocks, parts, 1), dy, h, *statistics, *sums, count, width, dy_stride, h_stride)
    return partial


def _block(width: int) -> int:
    """What configurations are chosen by: the power of two that holds a row, one for all that no program holds."""
    return min(next_power_of_2(width), 2 * IN_REGISTERS)


def examples(device: torch.device) -> Iterator[Example]:
    """GPT-2's, Llama's and the widest rows; what makes other code: dtypes, a residual (wider or not), bias, RMS."""
    for width in (64, 768, 1600, 4096, IN_REGISTERS):
        yield _example(device, width, torch.float32, torch.float32, True, False)
    for width in (768, IN_REGISTERS, 65536):
        yield _example(device, width, torch.bfloat16, torch.bfloat16, True, False)
        yield _example(device, width, torch.bfloat16, torch.float32, False, True)
        yield _example(device, width, torch.bfloat16, None, False, True)
    yield _example(device, 65536, torch.float32, torch.float32, True, False)
    yield _example(device, 777, torch.float16, None, True, False)
    yield _example(device, 10001, torch.float16, None, True, False)


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
