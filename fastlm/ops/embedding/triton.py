"""The embedding in Triton."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.ops.native import rows
from fastlm.ops.triton_support import FLOATS, Config, Example, Kernel, cdiv, next_power_of_2


@functools.cache
def _forward_candidates(arch: str, problem: tuple[int]) -> tuple[Config, ...]:
    return (Config(BLOCK=min(1024, problem[0]), num_warps=4),)


@functools.cache
def _backward_candidates(arch: str, problem: tuple[int]) -> tuple[Config, ...]:
    # Narrow, so that the one program of a frequent id is many programs side by side; 128 columns are a line or two.
    block = min(128, problem[0])
    return Config(BLOCK=block, PLACES=8, num_warps=4), Config(BLOCK=block, PLACES=16, num_warps=4)


MODULE = "fastlm.ops.embedding.triton_kernels"
FORWARD = Kernel(f"{MODULE}:forward", _forward_candidates)
BACKWARD = Kernel(f"{MODULE}:backward", _backward_candidates)


def unsupported(ids: Tensor, weight: Tensor, *rest: object) -> str | None:
    if weight.dtype not in FLOATS:
        return f"its kernels are for float32, bfloat16 and float16, got {weight.dtype}"
    if weight.shape[1] >= 2**23:
        return f"its kernels are for widths below 2^23, got {weight.shape[1]}"
    return None


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    y = weight.new_empty(*ids.shape, weight.shape[1])
    (count, width), vocabulary = (ids.numel(), weight.shape[1]), weight.shape[0]
    if vocabulary == 0:
        return y.fill_(float("nan"))
    weight, stride = rows(weight)
    config = FORWARD.config(weight.device, (next_power_of_2(width),))
    grid = (count, cdiv(width, config["BLOCK"]), 1)
    FORWARD(config, grid, ids.contiguous(), weight, y, vocabulary, width, stride)
    return y


def backward(dy: Tensor, ids: Tensor, vocabulary: int, padding: int) -> Tensor:
    count, width = ids.numel(), dy.shape[-1]
    keys, order = ids.reshape(-1).to(torch.int64).sort(stable=True)
    dweight = dy.new_zeros(vocabulary, width)
    dy, stride = rows(dy)
    config = BACKWARD.config(dy.device, (next_power_of_2(width),))
    grid = (count, cdiv(width, config["BLOCK"]), 1)
    BACKWARD(config, grid, dy, keys, order, dweight, count, vocabulary, padding, width, stride)
    return dweight


def examples(device: torch.device) -> Iterator[Example]:
    for dtype, integer, width in (
        (torch.float32, torch.int64, 768),
        (torch.bfloat16, torch.int64, 768),
        (torch.float16, torch.int32, 777),
    ):
        yield _example(device, dtype, integer, width)


def _example(device: torch.device, dtype: torch.dtype, integer: torch.dtype, width: int) -> Example:
    def call() -> None:
        ids = torch.zeros(4096, dtype=integer, device=device)
        y = forward(ids, torch.ones(50304, width, dtype=dtype, device=device))
        backward(y, ids, 50304, -1)

    return Example(f"4096x{width} {dtype} {integer}".replace("torch.", ""), call)
