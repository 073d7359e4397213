"""Attention over a cache through fastlm._C: the C++ kernel on CPU tensors, the CUDA kernel on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import memory, native
from fastlm.ops.decode_attention.reference import capacity_of
from fastlm.ops.native import DTYPE_CODE, pointer


def unsupported(q: Tensor, k_cache: Tensor, *rest: object) -> str | None:
    if q.dtype not in DTYPE_CODE:
        return f"its kernels are for float32, bfloat16 and float16, got {q.dtype}"
    if native.on_cuda(q) and q.shape[3] > 256:
        return f"its CUDA kernel is for head dims up to 256, got {q.shape[3]}"
    return None


def append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, at: Tensor) -> None:
    """k and v (B, H_kv, D) into row at[b] of each sequence b of the caches (B, S, H_kv, D); at (B) int64, from 0 to
    S - 1. Waits for nothing."""
    pair = ((k_cache, k), (v_cache, v))
    packed = all(t.stride(-1) == 1 and t.stride(-2) == t.shape[-1] for both in pair for t in both)
    built = native.on_cuda(k) and not (k.is_cuda and native.cuda_unavailable() is not None)
    if not built or k.dtype not in DTYPE_CODE or not packed:
        rows = torch.arange(len(at), device=at.device)
        k_cache[rows, at], v_cache[rows, at] = k, v
        return
    strides = (*k_cache.stride()[:2], *v_cache.stride()[:2], k.stride(0), v.stride(0))
    with native.on_its_device(k):
        native.C.cache_append_cuda(
            tuple(map(pointer, (k_cache, v_cache, k, v, at))),
            strides,
            len(k),
            k_cache.shape[1],
            k.shape[1] * k.shape[2],
            DTYPE_CODE[k.dtype],
            native.stream(k),
        )


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
    capacity = capacity_of(k_cache, block_table)
    if capacity == 0 or q.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q, cache_lengths = q.contiguous(), cache_lengths.contiguous()
    block_table = None if block_table is None else block_table.contiguous()
    k_cache, v_cache = (t if t.stride(3) == 1 else t.contiguous() for t in (k_cache, v_cache))
    sizes = (
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        batch,
        rows,
        heads,
        k_cache.shape[2],
        width,
        capacity,
        k_cache.shape[0],
        k_cache.shape[1],
        0 if block_table is None else block_table.shape[1],
        window,
    )

    def run(workspace: Tensor) -> None:
        tensors = (q, k_cache, v_cache, cache_lengths, block_table, alibi_slopes, out, workspace)
        native.C.decode_attention(
            native.on_cuda(q),
            tuple(map(pointer, tensors)),
            sizes,
            scale,
            softcap,
            DTYPE_CODE[q.dtype],
            native.stream(q),
        )

    floats = native.C.decode_attention_workspace(batch, rows, heads, width, capacity)
    run(q.new_empty(floats, dtype=torch.float32) if q.is_cuda else memory.empty((floats,), torch.float32))
    return out
