"""From the logits of the next token to a token: pure functions on logits (N, V), and `Sampling`, which orders them.

A filter sets the logits it excludes to -inf and leaves the others as they are; at least one token always remains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm import ops


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens that are in `seen`, (N, V) bool, less likely (penalty > 1).

    Keskar et al.: CTRL (arXiv:1909.05858), section 4.1: the logit is divided by the penalty. A negative logit is
    multiplied instead (as transformers does), so that it, too, goes down.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row (Fan et al., arXiv:1805.04833). Ties with the k-th are kept too."""
    if k >= logits.shape[-1]:
        return logits
    kth = torch.topk(logits, k, dim=-1).values[..., -1:]  # (N, 1)
    return logits.masked_fill(logits < kth, -math.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to p or more.

    Nucleus sampling: Holtzman et al. (arXiv:1904.09751), section 3.1.
    """
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = sorted_logits.float().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the sum over the tokens that are more likely
    drop_sorted = before >= p
    drop_sorted[..., 0] = False
    drop = torch.empty_like(drop_sorted).scatter_(-1, order, drop_sorted)
    return logits.masked_fill(drop, -math.inf)


def filter_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens that are at least p times as likely as the most likely one (Nguyen et al., arXiv:2407.01082)."""
    top = logits.amax(dim=-1, keepdim=True)
    return logits.masked_fill(logits < top + math.log(p), -math.inf)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: penalty, then temperature, then top-k, then top-p, then min-p, then a draw.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 1.0  # 0: the most likely token, always
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be an integer of at least 1, or None, got {self.top_k!r}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], or None, got {self.top_p}")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be in [0, 1], or None, got {self.min_p}")
        if self.repetition_penalty is not None and not 1e-6 <= self.repetition_penalty <= 1e6:
            raise ValueError(f"repetition_penalty must be from 1e-6 to 1e6, or None, got {self.repetition_penalty}")

    def filtered(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The logits (N, V) that are drawn from, float32. `seen` (N, V) bool: the tokens that the penalty is for."""
        logits = logits.float()
        if self.repetition_penalty is not None and seen is not None:
            logits = penalise_repetition(logits, seen, self.repetition_penalty)
        if self.temperature > 0:
            logits = logits / max(self.temperature, 1e-20)
        if self.top_k is not None:
            logits = filter_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1.0:
            logits = filter_top_p(logits, self.top_p)
        if self.min_p is not None and self.min_p > 0.0:
            logits = filter_min_p(logits, self.min_p)
        return logits

    def __call__(self, logits: Tensor, seen: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """One token for each row of logits (N, V): (N), int64. Drawn by `fastlm.ops.sample`."""
        if self.repetition_penalty is not None and seen is not None:
            logits = penalise_repetition(logits.float(), seen, self.repetition_penalty)
        return ops.sample(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            generator=generator,
        )
