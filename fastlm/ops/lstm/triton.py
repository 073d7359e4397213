"""The recurrence of an LSTM in Triton: a launch a step, each way.

In half precision the launch holds the step's product with the recurrent weight too, with the hidden state (backward:
the gates' gradients) rounded to that dtype, as the tensor cores take it. In float32 the products are left to PyTorch's
library, and the launch is the pass over their result.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.ops.checks import autocast_off
from fastlm.ops.lstm.reference import weight_gradient
from fastlm.ops.triton_support import FLOATS, Config, Example, Kernel, cdiv

LARGEST = 2**31 - 1


@functools.cache
def _forward_tiles(arch: str, problem: tuple[str, bool]) -> tuple[Config, ...]:
    """Four products share the registers. Few units a tile, so that there are tiles for many multiprocessors: a step is
    too small to fill a GPU."""
    return _tiles(arch, problem, 16, ((64, 32, 64), (32, 16, 128)))


@functools.cache
def _backward_tiles(arch: str, problem: tuple[str, bool]) -> tuple[Config, ...]:
    return _tiles(arch, problem, 32, ((64, 32, 64), (32, 32, 128)))


def _tiles(arch: str, problem: tuple[str, bool], low: int, high: tuple) -> tuple[Config, ...]:
    kind, aligned = problem
    if kind == "elementwise":  # 8 elements a thread: of each, four gates and two states
        return (Config(BM=16, BH=64, BK=16, num_warps=4),)
    stages = 2 if arch.startswith("gfx") else 3
    if kind == "few rows":
        tiles: tuple = ((16, low, 128),)
    elif aligned:
        tiles = high
    else:  # read element by element, with an address for each: with larger tiles these fill the registers
        tiles = ((32, 16, 32),)
    return tuple(Config(BM=bm, BH=bh, BK=bk, num_warps=4, num_stages=stages) for bm, bh, bk in tiles)


def _problem(fused: bool, batch: int, hidden: int) -> tuple[str, bool]:
    kind = "elementwise" if not fused else "few rows" if batch <= 16 else "many rows"
    return kind, not fused or hidden % 16 == 0


STEP = Kernel("fastlm.ops.lstm.triton_kernels:step", _forward_tiles)
STEP_BACKWARD = Kernel("fastlm.ops.lstm.triton_kernels:step_backward", _backward_tiles)


def unsupported(gates: Tensor, *rest: object) -> str | None:
    if gates.dtype not in FLOATS:
        return f"its kernels are for float32, bfloat16 and float16, got {gates.dtype}"
    if max(gates.shape) > LARGEST:
        return f"its kernels are for fewer than 2^31 rows, steps and gates, got {tuple(gates.shape)}"
    return None


def forward(gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if gates.stride(2) != 1:
        gates = gates.contiguous()
    weight = weight.contiguous()
    batch, steps, width = gates.shape
    hidden = width // 4
    y = gates.new_empty(batch, steps, hidden)
    cells = gates.new_empty(batch, steps, hidden, dtype=torch.float32)
    activations = gates.new_empty(batch, steps, width, dtype=torch.float32)
    fused = gates.dtype != torch.float32
    config = STEP.config(gates.device, _problem(fused, batch, hidden))
    grid = cdiv(batch, config["BM"]), cdiv(hidden, config["BH"]), 1
    even = hidden % config["BK"] == 0
    # The state before and after a step, in turn: programs read the whole of one while others write the other.
    h, h_next = h0.clone(memory_format=torch.contiguous_format), gates.new_empty(batch, hidden)
    c = c0.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    z = None if fused else gates.new_empty(batch, width)
    source, product = (gates, weight) if z is None else (z, None)
    strides = (gates.stride(0), gates.stride(1)) if z is None else (width, 0)
    with autocast_off(gates):
        for t in range(steps):
            if z is not None:
                torch.addmm(gates[:, t], h, weight.T, out=z)
            states = h, product, c, h_next, y, cells, activations
            STEP(config, grid, source, *states, batch, hidden, steps, t, *strides, even)
            h, h_next = h_next, h
    return y, cells, activations


def backward(
    dy: Tensor,
    dc: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weight: Tensor,
    y: Tensor,
    cells: Tensor,
    activations: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if dy.stride(2) != 1:
        dy = dy.contiguous()
    weight = weight.contiguous()
    batch, steps, hidden = cells.shape
    dgates = torch.empty_like(activations, dtype=dy.dtype)
    dcell = (torch.zeros_like(c0) if dc is None else dc).to(
        torch.float32, memory_format=torch.contiguous_format, copy=True
    )
    start = c0.to(torch.float32).contiguous()
    fused = dy.dtype != torch.float32
    config = STEP_BACKWARD.config(dy.device, _problem(fused, batch, hidden))
    grid = cdiv(batch, config["BM"]), cdiv(hidden, config["BH"]), 1
    numbers, strides = (batch, hidden, steps), (dy.stride(0), dy.stride(1))
    even = 4 * hidden % config["BK"] == 0
    dh = None if fused else torch.zeros_like(dcell)
    with autocast_off(dy):
        for t in range(steps - 1, -1, -1):
            last = t == steps - 1
            if not fused and not last:
                torch.mm(dgates[:, t + 1], weight, out=dh)
            product = weight if fused and not last else None
            STEP_BACKWARD(
                config, grid, dy, dh, product, dcell, start, cells, activations, dgates, *numbers, t, *strides, even
            )
        dh0 = torch.mm(dgates[:, 0], weight)
        dweight = weight_gradient(dgates, h0, y)
    return dgates, dh0, dcell.to(dy.dtype), dweight


def examples(device: torch.device) -> Iterator[Example]:
    """Few rows and many; units that no block divides; every dtype."""
    for rows, hidden, dtype in (
        (4, 512, torch.bfloat16),
        (64, 512, torch.bfloat16),
        (64, 512, torch.float16),
        (64, 100, torch.float16),
        (4, 100, torch.bfloat16),
        (64, 77, torch.bfloat16),
        (64, 512, torch.float32),
        (64, 77, torch.float32),
    ):
        yield _example(device, rows, hidden, dtype)


def _example(device: torch.device, rows: int, hidden: int, dtype: torch.dtype) -> Example:
    def call() -> None:
        gates = torch.ones(rows, 3, 4 * hidden, dtype=dtype, device=device)
        state, weight = gates[:, 0, :hidden], gates.new_ones(4 * hidden, hidden)
        y, cells, activations = forward(gates, state, state, weight)
        backward(y, None, state, state, weight, y, cells, activations)

    return Example(f"{rows} x 3 x {hidden} {dtype}".replace("torch.", ""), call)
