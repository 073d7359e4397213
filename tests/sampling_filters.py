"""Sampling step by step on the whole vocabulary: what `fastlm.ops.sample` draws from.

A filter sets the logits (N, V) that it excludes to -inf and leaves the others as they are; at least one token always
remains.
"""

from __future__ import annotations

import math

from torch import Tensor, empty_like, topk


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row. Ties with the k-th are kept too."""
    if k >= logits.shape[-1]:
        return logits
    kth = topk(logits, k, dim=-1).values[..., -1:]  # (N, 1)
    return logits.masked_fill(logits < kth, -math.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to p or more."""
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = sorted_logits.float().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the sum over the tokens that are more likely
    drop_sorted = before >= p
    drop_sorted[..., 0] = False
    drop = empty_like(drop_sorted).scatter_(-1, order, drop_sorted)
    return logits.masked_fill(drop, -math.inf)


def filter_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens that are at least p times as likely as the most likely one."""
    top = logits.amax(dim=-1, keepdim=True)
    return logits.masked_fill(logits < top + math.log(p), -math.inf)


def filtered(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The logits that are drawn from, float32: temperature, then top-k, then top-p, then min-p."""
    logits = logits.float()
    if temperature > 0:
        logits = logits / temperature
    if top_k is not None:
        logits = filter_top_k(logits, top_k)
    if top_p is not None and top_p < 1.0:
        logits = filter_top_p(logits, top_p)
    if min_p is not None and min_p > 0.0:
        logits = filter_min_p(logits, min_p)
    return logits
