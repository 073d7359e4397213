"""Sampling in plain PyTorch: the oracle of every other backend. csrc/sampling/sample.h has the integer weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlm.ops.checks import statistics_dtype
from fastlm.ops.philox import WORD, philox4x32

ONE = 2.0**40  # the weight of the most likely token


def unsupported(*call: Any) -> str | None:
    return None


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, log_min_p: float, rng_state: Tensor | None
) -> Tensor:
    x = logits.to(statistics_dtype(logits))
    if temperature > 0:
        x = x / temperature
    largest = x.amax(-1, keepdim=True)  # (B, 1); NaN where there is a NaN
    valid = largest.isfinite()
    if temperature == 0:
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape)
        ids = places.masked_fill(x < largest, x.shape[1]).amin(-1)
    else:
        assert rng_state is not None
        x = torch.where(valid, x, 0.0)
        largest = torch.where(valid, largest, 0.0)
        weights = kept_weights(x, largest, top_k, top_p, log_min_p)  # (B, V)
        ids = _first_beyond(weights, random_words(rng_state, x.shape[0]))
    return torch.where(valid[:, 0], ids, -1)


def kept_weights(x: Tensor, largest: Tensor, top_k: int, top_p: float, log_min_p: float) -> Tensor:
    """(B, V) int64: the integer weights of the tokens that are drawn from, 0 for the others."""
    weights = (torch.exp(x - largest) * ONE).to(torch.int64)
    if top_k:
        weights = weights.masked_fill(x < torch.topk(x, top_k, dim=-1).values[:, -1:], 0)
    if top_p < 1.0:
        order = x.sort(dim=-1, descending=True, stable=True).indices
        descending = weights.gather(-1, order)
        before = descending.cumsum(-1) - descending  # of the tokens that are more likely
        wanted = (weights.sum(-1, keepdim=True).double() * top_p).ceil().to(torch.int64).clamp(min=1)
        weights = torch.zeros_like(weights).scatter_(-1, order, descending.masked_fill(before >= wanted, 0))
    if log_min_p > -math.inf:
        weights = weights.masked_fill(x < largest + log_min_p, 0)
    return weights


def random_words(rng_state: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of each row's random number, (B) int64 each."""
    own = rng_state.dim() == 2
    row: Tensor | int = 0 if own else torch.arange(rows, device=rng_state.device)
    seed, offset = rng_state[..., 0], rng_state[..., 1] & WORD
    low, high, _, _ = philox4x32((row, 0, 0, offset), (seed & WORD, (seed >> 32) & WORD))
    return low.expand(rows), high.expand(rows)


def _first_beyond(weights: Tensor, words: tuple[Tensor, Tensor]) -> Tensor:
    """The first place at which the running sum exceeds floor(R * sum / 2^64): (B)."""
    sums = weights.cumsum(-1)  # (B, V)
    low, high = words
    total_low, total_high = sums[:, -1] & WORD, sums[:, -1] >> 32  # below 2^63
    first, second = high * total_low, low * total_high  # they wrap around, but their 64 bits are right
    carry = ((low * total_low >> 32) & WORD) + (first & WORD) + (second & WORD)
    left = high * total_high + ((first >> 32) & WORD) + ((second >> 32) & WORD) + (carry >> 32)
    return (sums <= left[:, None]).sum(-1)
