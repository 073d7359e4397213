"""The norm of gradients in Triton: a launch for each tensor, and one that puts them together."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlm.ops import native
from fastlm.ops.grad_norm.native import unsupported as unsupported
from fastlm.ops.triton_support import Config, Example, Kernel, cdiv


@functools.cache
def _squares(arch: str, problem: tuple) -> tuple[Config, ...]:
    # Eight elements a thread under way; 64 chunks of a matrix of 1024 x 1024 are enough programs to fill a small GPU.
    return (Config(CHUNK=16384, BLOCK=2048, num_warps=8),)


@functools.cache
def _finish(arch: str, problem: tuple) -> tuple[Config, ...]:
    return (Config(BLOCK=1024, num_warps=4),)


MODULE = "fastlm.ops.grad_norm.triton_kernels"
SQUARES = Kernel(f"{MODULE}:squares", _squares)
FINISH = Kernel(f"{MODULE}:finish", _finish)


def norm(gradients: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    device = gradients[0].device
    config = SQUARES.config(device, ())
    chunks = [cdiv(g.numel(), config["CHUNK"]) for g in gradients]
    sums = torch.empty(sum(chunks), dtype=torch.float64, device=device)
    result = torch.empty(2, dtype=torch.float32, device=device)
    first = 0
    with native.on_its_device(gradients[0]):
        for g, count in zip(gradients, chunks, strict=True):
            SQUARES(config, (count, 1, 1), g.contiguous(), sums, g.numel(), first)
            first += count
        FINISH(FINISH.config(device, ()), (1, 1, 1), sums, result, first, max_norm)
    return result[0], result[1]


def examples(device: torch.device) -> Iterator[Example]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield _example(device, dtype)


def _example(device: torch.device, dtype: torch.dtype) -> Example:
    def call() -> None:
        norm([torch.ones(3072, 768, dtype=dtype, device=device), torch.ones(777, dtype=dtype, device=device)], 1.0)

    return Example(f"3072x768 and 777 {dtype}".replace("torch.", ""), call)
