"""Philox4x32-10, the counter-based random numbers behind dropout, in plain int64 arithmetic.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).

A mask is a function of (seed, offset, position) alone. So it is the same on every backend, the backward pass draws it
again instead of keeping it, and no order of evaluation can change it. Seed and offset live in a small int64 tensor on
the device, so that a CUDA graph draws a new mask at each replay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what is added to the key from round to round
ROUNDS = 10
WORD = 0xFFFFFFFF


def philox4x32(counter: Sequence[Tensor | int], key: Sequence[Tensor | int]) -> tuple[Tensor, ...]:
    """Four random 32-bit words for each counter of four words, under a key of two words.

    The words are int64 tensors (or integers) in 0 .. 2^32 - 1 that broadcast against each other.
    """
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64) for c in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product of two words wraps around in int64, but its 64 bits are the right ones.
        even, odd = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((odd >> 32) & WORD) ^ c1 ^ k0,
            odd & WORD,
            ((even >> 32) & WORD) ^ c3 ^ k1,
            even & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def draw_state(device: torch.device) -> Tensor:
    """(seed, offset) as an int64 tensor on `device`, drawn from torch's default generator of that device."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """The words below it are dropped: round(p * 2^32), at most 2^32 - 1."""
    return min(round(p * 2**32), WORD)


def keep_mask(rng_state: Tensor, p: float, planes: Tensor, rows: range, columns: range) -> Tensor:
    """Which elements dropout with probability `p` keeps, as a bool tensor of shape (*planes.shape, rows, columns).

    Element (row i, column j) of a plane takes word j % 4 of the counter (i, j // 4, plane, offset), and is kept where
    the word is at least `threshold(p)`.

    Args:
        rng_state: (2) int64: seed and offset, on the device of the mask.
        planes: int64 numbers of the matrices, any shape (for attention: batch * heads + head).
        rows, columns: consecutive positions within the matrices.
    """
    seed, offset = rng_state[0], rng_state[1] & WORD
    first = columns.start // 4
    groups = torch.arange(first, -(-columns.stop // 4), device=rng_state.device)
    i = torch.arange(rows.start, rows.stop, device=rng_state.device)
    words = philox4x32(
        (i[:, None], groups, planes.to(rng_state.device)[..., None, None], offset), (seed & WORD, (seed >> 32) & WORD)
    )
    mask = torch.stack(words, -1).flatten(-2) >= threshold(p)  # (..., rows, 4 * groups)
    return mask[..., columns.start - 4 * first : columns.stop - 4 * first]
