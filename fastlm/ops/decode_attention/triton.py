"""Attention over a cache in Triton: parts of the cache side by side, then their results put together."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.ops.decode_attention.reference import capacity_of
from fastlm.ops.triton_support import (
    FLOATS,
    INTERPRETED,
    Config,
    Example,
    Kernel,
    architecture,
    cdiv,
    dtype_name,
    next_power_of_2,
)

WIDEST, WIDEST_FLOAT32 = 256, 128  # head dim
LONGEST = 2**30  # tokens: sums of two positions stay in 32 bits
BLOCK_R = 16  # rows that share keys and values, worked on together: what a matrix instruction takes at least


@functools.cache
def _parts(arch: str, problem: tuple[str, int]) -> tuple[Config, ...]:
    """A part is as long whatever the batch, or the bits of a sequence would depend on its neighbours. Blocks of keys of
    16 KB, and as much of values, fit the registers of four warps beside the sums."""
    if INTERPRETED:  # its time goes by the number of blocks
        return (Config(PART=128, BLOCK_N=128, BLOCK_R=BLOCK_R),)
    dtype, width = problem
    block = max(16, 8192 // width // (2 if dtype == "fp32" else 1))
    return (Config(PART=256, BLOCK_N=min(128, block), BLOCK_R=BLOCK_R, num_warps=4),)


@functools.cache
def _combine(arch: str, problem: tuple[int]) -> tuple[Config, ...]:
    # About 2048 numbers at a time: 16 a thread.
    return (Config(D_PADDED=problem[0], BLOCK_P=max(8, 2048 // problem[0]), num_warps=4),)


MODULE = "fastlm.ops.decode_attention.triton_kernels"
PARTS = Kernel(f"{MODULE}:parts_of_rows", _parts)
COMBINE = Kernel(f"{MODULE}:combine", _combine)


def unsupported(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None, *rest: object
) -> str | None:
    if q.dtype not in FLOATS:
        return f"its kernels are for float32, bfloat16 and float16, got {q.dtype}"
    if q.shape[3] > WIDEST:
        return f"its kernels are for head dims up to {WIDEST}, got {q.shape[3]}"
    if q.dtype == torch.float32 and q.shape[3] > WIDEST_FLOAT32:
        return f"its float32 kernels are for head dims up to {WIDEST_FLOAT32}, got {q.shape[3]}: wider ones would spill"
    if capacity_of(k_cache, block_table) > LONGEST:
        return f"its kernels are for caches of up to {LONGEST} tokens, got {capacity_of(k_cache, block_table)}"
    return None


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    batch, rows, heads, width = q.shape
    capacity, group = capacity_of(k_cache, block_table), heads // k_cache.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() == 0 or capacity == 0:
        return out.zero_()
    q, cache_lengths = q.contiguous(), cache_lengths.contiguous()
    block_table = None if block_table is None else block_table.contiguous()
    k_cache, v_cache = (t if t.stride(3) == 1 else t.contiguous() for t in (k_cache, v_cache))
    padded = next_power_of_2(max(width, 16))
    config = PARTS.config(q.device, (dtype_name(q), padded))
    parts = cdiv(capacity, config["PART"])
    sums = q.new_empty((batch, parts, heads, rows, width), dtype=torch.float32)
    statistics = q.new_empty((2, batch, parts, heads, rows), dtype=torch.float32)
    seen = min(window, capacity + rows)  # further than any position: keeps sums in 32 bits
    factor, cap = (scale / softcap, softcap * math.log2(math.e)) if softcap > 0 else (scale * math.log2(math.e), 0.0)
    PARTS(
        config,
        (parts * cdiv(group * rows, config["BLOCK_R"]) * k_cache.shape[2] * batch, 1, 1),
        *(q, k_cache, v_cache, cache_lengths, block_table, alibi_slopes, sums, statistics),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        *(capacity, parts, k_cache.shape[1], k_cache.shape[0]),
        0 if block_table is None else block_table.shape[1],
        *(batch, rows, group, heads, seen, factor, cap),
        *(width, padded, window >= 0, softcap > 0),
        "ieee" if architecture(q.device).startswith("gfx") else "tf32x3",  # of float32, as in attention
    )
    part = config["PART"]
    config = COMBINE.config(q.device, (padded,))
    COMBINE(
        config,
        (batch * rows * heads, 1, 1),
        *(out, cache_lengths, sums, statistics),
        *(capacity, parts, batch, rows, heads, seen),
        *(width, window >= 0, part),
    )
    return out


def examples(device: torch.device) -> Iterator[Example]:
    """Head dims of common models, a padded one, pages, and every option at once."""
    for width, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (256, torch.float16), (128, torch.float32)):
        yield _example(device, width, dtype)
    yield _example(device, 128, torch.float32, every_option=True)
    yield _example(device, 128, torch.bfloat16, paged=True)
    yield _example(device, 80, torch.bfloat16, paged=True, every_option=True)


def _example(
    device: torch.device, width: int, dtype: torch.dtype, paged: bool = False, every_option: bool = False
) -> Example:
    """`every_option`: a window, softcap and ALiBi."""

    def call() -> None:
        q = torch.ones(8, 1, 16, width, dtype=dtype, device=device)
        cache = torch.ones(*((512, 64) if paged else (8, 4096)), 4, width, dtype=dtype, device=device)
        lengths = torch.zeros(8, dtype=torch.int32, device=device)
        table = torch.zeros(8, 64, dtype=torch.int32, device=device) if paged else None
        slopes = torch.ones(16, device=device) if every_option else None
        options = (512, 30.0) if every_option else (-1, 0.0)
        forward(q, cache, cache, lengths, table, slopes, width**-0.5, *options)

    name = f"{width} {dtype}{' paged' if paged else ''}{' every option' if every_option else ''}"
    return Example(name.replace("torch.", ""), call)
