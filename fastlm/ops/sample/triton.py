"""Sampling in Triton: one launch, a program a row."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.ops.triton_support import FLOATS, Config, Example, Kernel, next_power_of_2


@functools.cache
def _candidates(arch: str, problem: tuple[int]) -> tuple[Config, ...]:
    # A row has one program: many warps, to hide each other's waits for the cache.
    return (Config(BLOCK=min(4096, problem[0]), num_warps=8),)


SAMPLE = Kernel("fastlm.ops.sample.triton_kernels:sample", _candidates)


def unsupported(logits: Tensor, *rest: object) -> str | None:
    if logits.dtype not in FLOATS:
        return f"its kernel is for float32, bfloat16 and float16, got {logits.dtype}"
    return None


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, log_min_p: float, rng_state: Tensor | None
) -> Tensor:
    rows, vocabulary = logits.shape
    ids = logits.new_empty(rows, dtype=torch.int64)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    greedy = temperature == 0
    state = None if greedy or rng_state is None else rng_state.contiguous()
    config = SAMPLE.config(logits.device, (next_power_of_2(vocabulary),))
    SAMPLE(
        config,
        (rows, 1, 1),
        *(logits, ids, state, vocabulary, logits.stride(0)),
        1.0 if greedy else temperature,
        top_k,
        struct.unpack("q", struct.pack("d", top_p))[0],
        log_min_p,
        state is not None and state.dim() == 2,
        top_k > 0,
        top_p < 1.0,
        log_min_p > -math.inf,
    )
    return ids


def examples(device: torch.device) -> Iterator[Example]:
    """Every option and none, greedy; a row for each state."""
    for dtype, vocabulary, temperature, top_k, top_p, log_min_p in (
        (torch.float32, 50257, 0.8, 50, 0.9, -3.0),
        (torch.bfloat16, 50304, 0.8, 50, 0.9, -3.0),
        (torch.bfloat16, 50304, 1.0, 0, 1.0, -math.inf),
        (torch.float16, 50304, 0.0, 0, 1.0, -math.inf),
        (torch.float32, 65, 1.0, 0, 0.9, -math.inf),
    ):
        yield _example(device, dtype, vocabulary, temperature, top_k, top_p, log_min_p)


def _example(
    device: torch.device,
    dtype: torch.dtype,
    vocabulary: int,
    temperature: float,
    top_k: int,
    top_p: float,
    log_min_p: float,
) -> Example:
    def call() -> None:
        state = torch.zeros(8, 2, dtype=torch.int64, device=device)
        sample(torch.ones(8, vocabulary, dtype=dtype, device=device), temperature, top_k, top_p, log_min_p, state)

    name = f"8x{vocabulary} {dtype} temperature {temperature} top-k {top_k} top-p {top_p}"
    return Example(name.replace("torch.", ""), call)
