"""Rotary positions: the angles by which `fastlm.ops.rotary` turns queries and keys.

Su et al.: RoFormer (arXiv:2104.09864). The halves of a head are paired (dimension i with i + D/2), as in transformers'
Llama, so its checkpoints need no permutation. The scaling of Llama 3.1 for long contexts is that of Meta's reference
code, YaRN's is that of transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.hints import from_fields
from fastlm.nn.computed import Computed


@dataclass(frozen=True)
class RopeScaling:
    """How a model that was trained on `original_block_size` tokens stretches its rotary frequencies to more.

    "llama3": wavelengths over original_block_size / low_freq_factor are stretched by `factor`, those under
    original_block_size / high_freq_factor are kept, those between are blended.
    "linear": all are stretched by `factor`, below 1 shrunk (Chen et al., arXiv:2306.15595).
    "yarn": pairs that turn less than `beta_slow` times in original_block_size are stretched by `factor`, those that
    turn more than `beta_fast` times are kept, the pairs between are blended by their number; queries and keys are
    multiplied by `attention_factor`, None: 0.1 ln(factor) + 1 (Peng et al., arXiv:2309.00071).
    """

    kind: str = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_block_size: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def magnitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

    def __post_init__(self) -> None:
        if self.kind not in ("llama3", "linear", "yarn"):
            raise ValueError(f"rope_scaling: kind must be llama3, linear or yarn, got {self.kind!r}")
        if not self.original_block_size >= 1:
            raise ValueError(f"rope_scaling: original_block_size must be at least 1, got {self.original_block_size}")
        if not (self.factor >= 1.0 or (self.kind == "linear" and self.factor > 0.0)):
            raise ValueError(f"rope_scaling: factor must be at least 1 (linear: above 0), got {self.factor}")
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                "rope_scaling: beta_slow must be positive and below beta_fast, got "
                f"{self.beta_slow} and {self.beta_fast}"
            )
        if self.attention_factor is not None and (self.kind != "yarn" or not self.attention_factor > 0):
            raise ValueError(
                f"rope_scaling: attention_factor is YaRN's and positive, got {self.attention_factor} for {self.kind}"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor <= self.high_freq_factor:
            raise ValueError(
                "rope_scaling: low_freq_factor must be positive and not above high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RopeScaling:
        """From a dict of its fields. An unknown key is an error that names the nearest field."""
        return from_fields(cls, fields, "rope_scaling")


def rotary_frequencies(head_dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> Tensor:
    """The angle per position of each pair of dimensions: theta^(-2i/D), (D/2), float32, in radians."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (D/2)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "yarn":
        low, high = (_pair_that_turns(n, head_dim, theta, scaling) for n in (scaling.beta_fast, scaling.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
        width = high - low or 0.001  # as in transformers
        stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
        return stretch * frequency / scaling.factor + (1 - stretch) * frequency
    turns = scaling.original_block_size * frequency / (2 * math.pi)  # turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low or 1e-9)).clamp(0.0, 1.0)  # 0: stretch in full, 1: keep
    return (1 - keep) * frequency / scaling.factor + keep * frequency


def _pair_that_turns(times: float, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """The number of the pair of dimensions that turns this often within the original context, not rounded."""
    return head_dim * math.log(scaling.original_block_size / (times * 2 * math.pi)) / (2 * math.log(theta))


class Rotary(nn.Module):
    """Holds the frequencies; gives the rotation of a set of positions."""

    def __init__(self, head_dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.frequencies = Computed(partial(rotary_frequencies, head_dim, theta, scaling))
        self.magnitude = 1.0 if scaling is None else scaling.magnitude

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: (T) or (B, T), integers. Returns cosines and sines, each positions' shape + (D/2), float32; with
        YaRN, times its magnitude."""
        angles = positions[..., None].float() * self.frequencies.value
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.magnitude == 1.0 else (cos * self.magnitude, sin * self.magnitude)
