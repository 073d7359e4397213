"""Attention of a few new tokens over a cache of keys and values: ragged batches, contiguous or paged caches.

Dao, Haziza, Massa, Sizov: Flash-Decoding (2023): the cache is cut into parts whose results are put together.
Kwon et al.: Efficient Memory Management for Large Language Model Serving with PagedAttention (arXiv:2309.06180).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlm.ops import checks, library, registry
from fastlm.ops.decode_attention import native, reference, triton

MAX_ROWS = 16  # new tokens a sequence: more are a prefill, which fastlm.ops.attention is for


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T tokens of each sequence, whose keys and values are in the cache already.

    A sequence's result has the same bits alone as in any batch, and with any number of threads. There is no backward
    pass.

    Args:
        q: (B, T, H, D), T from 0 to 16: row t of a sequence of n tokens stands at position n - T + t. float32, bfloat16
            or float16 (float64 on the reference backend).
        k_cache, v_cache: (B, S, H_kv, D) of q's dtype, where H_kv divides H; any strides, read without a copy where the
            last dimension is contiguous. With a block table (pages, page_size, H_kv, D).
        cache_lengths: (B) int32: the tokens of each sequence, the T new ones included.
        block_table: (B, M) int32: the page of each page_size tokens of a sequence. Entries beyond its length are not
            read.
        scale: factor on the scores; None: 1 / sqrt(D).
        window: how many tokens in front of its own a row sees; None: all.
        softcap: where positive, scores become softcap * tanh(scores / softcap).
        alibi_slopes: (H) or (B, H); adds -slope * distance to the scores.

    Returns:
        (B, T, H, D), contiguous, in q's dtype. Softmax and sums are taken in float32. A row with nothing to attend to
        is zero. Autocast changes nothing here.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit together; on the CPU: a length or a page is out of
            range. On CUDA these are not looked at, which would wait for the device: a length over the capacity counts
            as the capacity, and a page out of range is left out.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    call = _prepare(
        q,
        k_cache,
        v_cache,
        cache_lengths,
        block_table=block_table,
        scale=scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k_cache, v_cache, alibi_slopes)):
        raise ValueError("decode_attention has no backward pass: call it under torch.no_grad(), or call attention")
    return _forward(*call, registry.choose("decode_attention", q.device.type, call))


def _prepare(
    q,
    k_cache,
    v_cache,
    cache_lengths,
    *,
    block_table=None,
    scale=None,
    window=None,
    softcap=0.0,
    alibi_slopes=None,
) -> tuple:
    """Check the contract; the arguments of a backend's `forward`. Plain conditions first: every step pays for them."""
    op = "decode_attention"
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} must have 4 dimensions, got {tuple(t.shape)}")
    batch, length, heads, width = q.shape
    dtype, device = q.dtype, q.device
    if dtype not in checks.FLOATS or k_cache.dtype != dtype or v_cache.dtype != dtype:
        checks.floating(op, q=q, k_cache=k_cache, v_cache=v_cache)
        checks.same_dtype(op, "q", q, k_cache=k_cache, v_cache=v_cache)
    if k_cache.device != device or v_cache.device != device or cache_lengths.device != device:
        checks.same_device(op, "q", q, k_cache=k_cache, v_cache=v_cache, cache_lengths=cache_lengths)
    if length > MAX_ROWS:
        raise ValueError(f"{op}: at most {MAX_ROWS} new tokens a sequence, got {length}; attention takes more")
    entries = k_cache.shape[0] if block_table is not None else batch
    if k_cache.shape[0] != entries or k_cache.shape[3] != width or width == 0:
        raise ValueError(
            f"{op}: k_cache must have shape (B, S, H_kv, D) = ({batch}, S, H_kv, {width}), or (pages, page_size, H_kv,"
            f" {width}) with a block table, D > 0, got {tuple(k_cache.shape)}"
        )
    if v_cache.shape != k_cache.shape:
        checks.shape(op, "v_cache", v_cache, k_cache.shape, "of k_cache")
    kv_heads = k_cache.shape[2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: the heads of the cache must divide those of q, got {kv_heads} and {heads}")
    if cache_lengths.dtype != torch.int32 or cache_lengths.shape != (batch,):
        raise ValueError(
            f"{op}: cache_lengths must be int32 of shape (B) = ({batch},), got {cache_lengths.dtype} of shape"
            f" {tuple(cache_lengths.shape)}"
        )
    if block_table is not None:
        checks.same_device(op, "q", q, block_table=block_table)
        if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"{op}: block_table must be int32 of shape (B, M) = ({batch}, M), got {block_table.dtype} of shape"
                f" {tuple(block_table.shape)}"
            )
        if k_cache.shape[0] == 0 or k_cache.shape[1] == 0:
            raise ValueError(
                f"{op}: wanted at least one page of one token, got k_cache of shape {tuple(k_cache.shape)}"
            )
    scale = width**-0.5 if scale is None else float(scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    if window is not None and window < 0:
        raise ValueError(f"{op}: window must be None or not negative, got {window}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap must be 0 (none) or positive, got {softcap}")
    if alibi_slopes is not None:
        checks.same_device(op, "q", q, alibi_slopes=alibi_slopes)
        if alibi_slopes.shape not in ((heads,), (batch, heads)):
            raise ValueError(
                f"{op}: alibi_slopes must have shape (H) = ({heads},) or (B, H) = ({batch}, {heads}), got"
                f" {tuple(alibi_slopes.shape)}"
            )
        (alibi_slopes,) = checks.detached(op, alibi_slopes)
        alibi_slopes = alibi_slopes.to(checks.statistics_dtype(q)).contiguous()
    left = -1 if window is None else int(window)
    return q, k_cache, v_cache, cache_lengths, block_table, alibi_slopes, scale, left, float(softcap)


def _forward_impl(*arguments):
    return registry.implementation("decode_attention", arguments[-1]).forward(*arguments[:-1])


def _forward_fake(q, *arguments):
    return q.new_empty(q.shape)


_forward = library.define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, Tensor? block_table,"
    " Tensor? alibi_slopes, float scale, int window, float softcap, str backend) -> Tensor",
    _forward_impl,
    _forward_fake,
)

registry.register("decode_attention", _prepare, reference=reference, cpu=native, cuda=native, triton=triton)
