"""Sequences of different lengths in one row, one after the other: padding is never computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Padding(NamedTuple):
    """Where the tokens of a padded batch (B, T) are, and how they lie in the packed row (1, n)."""

    where: Tensor  # (n) int64: the tokens' places in the flattened batch
    cu_seqlens: Tensor  # (B + 1) int32: where each sequence starts in the packed row, and the end of the last
    max_seqlen: int
    shape: tuple[int, int]  # B, T

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, …) -> (1, n, …)"""
        return x.flatten(0, 1)[self.where].unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """(1, n, …) -> (B, T, …), zero at the padding."""
        batch, length = self.shape
        out = x.new_zeros((batch * length, *x.shape[2:]))
        return out.index_copy(0, self.where, x.squeeze(0)).unflatten(0, (batch, length))


def padding(attention_mask: Tensor) -> Padding:
    """From a mask (B, T) that is 1 (or True) at tokens and 0 at padding, which may be anywhere.

    Waits for a GPU: how many tokens there are decides the shapes.
    """
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must have shape (B, T), got {tuple(attention_mask.shape)}")
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    sequences = max(len(mask), 1)  # of no rows: a packed row has one sequence at least, which is empty here
    cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32, device=mask.device)
    cu_seqlens[1 : len(mask) + 1] = lengths.cumsum(0)
    longest = int(lengths.max()) if len(mask) else 0
    return Padding(mask.flatten().nonzero().squeeze(1), cu_seqlens, longest, (mask.shape[0], mask.shape[1]))


def packed_positions(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Of each token of a packed row: the number of its sequence, and its position there, both (T)."""
    places = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, places, right=True) - 1
    return sequence, places - cu_seqlens[sequence]


POOLINGS = ("mean", "first", "last")


def pool(hidden: Tensor, cu_seqlens: Tensor, how: str) -> Tensor:
    """One vector a sequence: the mean over its tokens, or its first or last token's.

    Args:
        hidden: (1, T, C), packed.
        cu_seqlens: (N + 1) int32; no sequence is empty.
        how: "mean", "first" or "last".

    Returns:
        (N, C). The mean is a product with the (N, T) matrix of weights: deterministic, forward and backward.
    """
    if how not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {how!r}")
    rows = hidden.squeeze(0)
    if how == "first":
        return rows[cu_seqlens[:-1].long()]
    if how == "last":
        return rows[cu_seqlens[1:].long() - 1]
    sequence, _ = packed_positions(cu_seqlens, len(rows))
    numbers = torch.arange(len(cu_seqlens) - 1, device=rows.device)
    weights = (sequence == numbers[:, None]).to(rows.dtype) / cu_seqlens.diff()[:, None]
    return weights.to(rows.dtype) @ rows
