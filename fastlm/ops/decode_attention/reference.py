"""Attention over a cache in plain PyTorch: the oracle of every other backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.ops.checks import statistics_dtype


def unsupported(*call: Any) -> str | None:
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
    rows, heads = q.shape[1:3]
    wide, group = statistics_dtype(q), heads // k_cache.shape[2]
    if not q.is_cuda:
        check_ranges(k_cache, cache_lengths, block_table)
    j = torch.arange(capacity_of(k_cache, block_table), device=q.device)
    inside = j < cache_lengths[:, None]  # (B, S)
    # What lies beyond a sequence's end may be anything: zeros, so that 0 times it is 0.
    k, v = (_tokens(t, block_table, inside).to(wide).repeat_interleave(group, 2) for t in (k_cache, v_cache))
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    i = cache_lengths[:, None] - rows + torch.arange(rows, device=q.device)  # (B, T): the rows' positions
    distance = i[:, None, :, None] - j  # (B, 1, T, S)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None].to(wide) * distance.abs()
    hidden = ~inside[:, None, None] | (distance < 0)
    if window >= 0:
        hidden = hidden | (distance > window)
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(q.dtype).contiguous()


def capacity_of(k_cache: Tensor, block_table: Tensor | None) -> int:
    """The tokens that a sequence can have."""
    return k_cache.shape[1] if block_table is None else k_cache.shape[1] * block_table.shape[1]


def check_ranges(k_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None) -> None:
    capacity, pages, page = capacity_of(k_cache, block_table), k_cache.shape[0], k_cache.shape[1]
    for b, length in enumerate(cache_lengths.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"decode_attention: the length of sequence {b} is {length}; wanted 0 to {capacity}")
        if block_table is None:
            continue
        for i, number in enumerate(block_table[b, : -(-length // page)].tolist()):
            if not 0 <= number < pages:
                raise ValueError(f"decode_attention: page {i} of sequence {b} is {number}; wanted 0 to {pages - 1}")


def _tokens(cache: Tensor, block_table: Tensor | None, inside: Tensor) -> Tensor:
    """(B, S, H_kv, D)"""
    if block_table is not None:
        cache = cache[block_table.clamp(0, cache.shape[0] - 1)].flatten(1, 2)
    return cache.masked_fill(~inside[..., None, None], 0.0)
