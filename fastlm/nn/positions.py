"""Positions without parameters: sinusoids added to the embedding, and ALiBi's slopes."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from fastlm.nn.computed import Computed


def sinusoid_frequencies(n_embd: int) -> Tensor:
    """10000^(-2i/C), (C/2), float32, in radians per position."""
    return torch.exp(torch.arange(0, n_embd, 2, dtype=torch.float32) * (-math.log(10000.0) / n_embd))


class Sinusoidal(nn.Module):
    """Sines in the even dimensions, cosines in the odd ones (Vaswani et al., arXiv:1706.03762, section 3.5)."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.frequencies = Computed(partial(sinusoid_frequencies, n_embd))

    def forward(self, positions: Tensor) -> Tensor:
        """positions: (T) or (B, T), integers. Returns positions' shape + (C), float32."""
        angles = positions[..., None].float() * self.frequencies.value  # (..., C/2)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # (..., C)


def alibi_slopes(n_head: int) -> Tensor:
    """The slope of each head's linear bias -slope * distance (Press et al., arXiv:2108.12409): (H), float32.

    For a power of two: the geometric sequence from 2^(-8/H) with that ratio. For other H, as the paper's code: the
    slopes of the next smaller power of two, then every second one of twice that power.
    """
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return torch.tensor(slopes + between[: n_head - power], dtype=torch.float32)
