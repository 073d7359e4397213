"""From the logits of the next token to a token: a penalty on what was there already, then `fastlm.ops.sample`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm import ops
from fastlm.ops.sample import check_options


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens that are in `seen`, (N, V) bool, less likely (penalty > 1).

    Keskar et al.: CTRL (arXiv:1909.05858), section 4.1: the logit is divided by the penalty. A negative logit is
    multiplied instead (as transformers does), so that it, too, goes down.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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
        check_options(self.temperature, self.top_k, self.top_p, self.min_p)
        if self.repetition_penalty is not None and not 1e-6 <= self.repetition_penalty <= 1e6:
            raise ValueError(f"repetition_penalty must be from 1e-6 to 1e6, or None, got {self.repetition_penalty}")

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
