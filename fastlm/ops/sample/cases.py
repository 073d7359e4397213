"""Benchmark cases of sampling. It draws at random, unlike the ops of the suite: test_sample.py tests it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.case import Case, Maker


def eager_sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The usual chain of operations on the whole vocabulary."""
    x = logits.float() / temperature
    if top_k is not None:
        x = x.masked_fill(x < torch.topk(x, top_k, dim=-1).values[..., -1:], -torch.inf)
    if top_p is not None:
        ordered, order = x.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        drop = probabilities.cumsum(dim=-1) - probabilities >= top_p
        x = x.masked_fill(torch.empty_like(drop).scatter_(-1, order, drop), -torch.inf)
    probabilities = x.softmax(dim=-1)
    if min_p is not None:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0.0)
    return torch.multinomial(probabilities, 1)[:, 0]


def _case(name: str, rows: int, vocabulary: int, **options) -> Case:
    def build(make: Maker) -> dict:
        return {"logits": make.randn(rows, vocabulary, scale=2.0), **options}

    return Case("sample", name, build, eager_sample, bench=True, traits=frozenset({"forward", "random"}))


CASES = [
    _case("1x50257", 1, 50257),
    _case("8x50257-top-k", 8, 50257, temperature=0.8, top_k=50),
    _case("8x50257-top-p", 8, 50257, top_p=0.95),
    _case("1x128256-top-k-top-p", 1, 128256, top_k=200, top_p=0.9, min_p=0.02),
]
