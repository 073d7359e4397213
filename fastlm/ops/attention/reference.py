"""Attention in plain PyTorch: the oracle of every other backend.

It works through blocks of query rows, so that the scores of a long sequence are never there all at once, and looks
only at the columns that a block can see.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.ops import philox
from fastlm.ops.checks import statistics_dtype

BLOCK_SCORES = 2**22  # scores held at a time, over all heads: 16 MB in float32


def unsupported(*call) -> str | None:
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    rng_state: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:
    wide = statistics_dtype(q)
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide)
    qh, kh, vh = (t.to(wide).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, H_kv, S, D)
    for rows, columns, diagonal in _blocks(q, k, cu_seqlens, window_left, window_right):
        i, j = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        scores, _ = _scores(
            qh[:, :, i], kh[:, :, j], rows, columns, diagonal, alibi_slopes, scale, window_left, window_right, softcap
        )
        largest = _finite(scores.amax(-1))  # (B, H, rows)
        weights = torch.exp(scores - largest[..., None])
        total = weights.sum(-1)
        weights = weights / total.masked_fill(total == 0, 1.0)[..., None]
        if rng_state is not None:
            weights = weights * _dropout(weights, rng_state, dropout_p, rows, columns)
        out[:, i] = _times(weights, vh[:, :, j]).transpose(1, 2)
        lse[:, :, i] = largest + total.log()
    return out, lse


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    rng_state: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    wide = statistics_dtype(q)
    sums = [torch.zeros_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in (q, k, v)]
    dq_sum, dk_sum, dv_sum = sums
    qh, kh, vh = (t.to(wide).transpose(1, 2) for t in (q, k, v))
    if dout is not None:
        douth = dout.to(wide).transpose(1, 2)  # (B, H, T, D)
        delta = (douth * out.to(wide).transpose(1, 2)).sum(-1)  # (B, H, T): the sum over j of weight * dweight
    for rows, columns, diagonal in _blocks(q, k, cu_seqlens, window_left, window_right):
        i, j = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        qi, kj = qh[:, :, i], kh[:, :, j]
        scores, slope = _scores(
            qi, kj, rows, columns, diagonal, alibi_slopes, scale, window_left, window_right, softcap
        )
        weights = torch.exp(scores - _finite(lse[:, :, i])[..., None])
        dscores = torch.zeros_like(weights)
        if dout is not None:
            di = douth[:, :, i]
            dweights = _times(di, vh[:, :, j].mT)
            dropped = weights
            if rng_state is not None:
                kept = _dropout(weights, rng_state, dropout_p, rows, columns)
                dropped, dweights = weights * kept, dweights * kept
            dv_sum[:, j] += _columns(dropped, di, v.shape[2]).transpose(1, 2)
            dscores = weights * (dweights - delta[:, :, i, None])
        if dlse is not None:
            dscores = dscores + weights * dlse[:, :, i, None].to(wide)
        dscores = dscores * scale if slope is None else dscores * (slope * scale)
        dq_sum[:, i] = _times(dscores, kj).transpose(1, 2)
        dk_sum[:, j] += _columns(dscores, qi, k.shape[2]).transpose(1, 2)
    for gradient, total in zip((dq, dk, dv), sums, strict=True):
        gradient.copy_(total)


def _blocks(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, left: int, right: int
) -> Iterator[tuple[range, range, int]]:
    """Blocks of rows, the columns that they can see, and the diagonal: row i is aligned with column i + diagonal."""
    batch, length, heads, _ = q.shape
    if cu_seqlens is None:
        sequences = [(0, length, 0, k.shape[1])]
    else:
        sequences = [(a, b, a, b) for a, b in itertools.pairwise(cu_seqlens.tolist())]
    for first_row, last_row, first, last in sequences:
        diagonal = last - last_row
        step = max(16, BLOCK_SCORES // max(1, batch * heads * (last - first)))
        for start in range(first_row, last_row, step):
            stop = min(start + step, last_row)
            low = first if left < 0 else max(first, start + diagonal - left)
            high = last if right < 0 else min(last, stop + diagonal + right)
            if low < high:
                yield range(start, stop), range(low, high), diagonal


def _scores(qi, kj, rows, columns, diagonal, alibi_slopes, scale, left, right, softcap) -> tuple[Tensor, Tensor | None]:
    """The masked scores (B, H, rows, columns), and the derivative of the softcap (None without one)."""
    scores = _times(qi, kj.mT) * scale
    slope = None
    if softcap > 0:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped.square()
    i = torch.arange(rows.start, rows.stop, device=qi.device)[:, None] + diagonal
    j = torch.arange(columns.start, columns.stop, device=qi.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * (i - j).abs()
    if left >= 0:
        scores = scores.masked_fill(j < i - left, -torch.inf)
    if right >= 0:
        scores = scores.masked_fill(j > i + right, -torch.inf)
    return scores, slope


def _finite(t: Tensor) -> Tensor:
    """Zero instead of -inf: in a row with nothing to attend to, exp(-inf - 0) is 0, where exp(-inf + inf) is NaN."""
    return t.masked_fill(t == -torch.inf, 0.0)


def _dropout(weights: Tensor, rng_state: Tensor, p: float, rows: range, columns: range) -> Tensor:
    batch, heads = weights.shape[:2]
    planes = torch.arange(batch * heads, device=weights.device).view(batch, heads)
    return philox.keep_mask(rng_state, p, planes, rows, columns).to(weights.dtype) / (1 - p)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a (B, H, M, K) @ b (B, H_kv, K, N): the heads of a group become rows of one product."""
    batch, heads, m, inner = a.shape
    kv_heads, n = b.shape[1], b.shape[3]
    return (a.reshape(batch, kv_heads, heads // kv_heads * m, inner) @ b).view(batch, heads, m, n)


def _columns(a: Tensor, b: Tensor, kv_heads: int) -> Tensor:
    """a^T (B, H, M, N) @ b (B, H, M, D), summed over the heads of a group: (B, H_kv, N, D)."""
    batch, heads, m, n = a.shape
    rows = heads // kv_heads * m
    return a.reshape(batch, kv_heads, rows, n).mT @ b.reshape(batch, kv_heads, rows, b.shape[3])
