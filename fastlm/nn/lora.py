"""LoRA: a linear layer whose weight stays, beside a product of two thin matrices that learns.

Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.nn.linear import linear


class LoRALinear(nn.Linear):
    """x @ (W + alpha / rank * B @ A).T + b, with W and b frozen.

    W may be several projections one below the other (queries, keys, values); each of its adapted parts has an A
    (rank, in) and a B (rows, rank) of its own. Until training B is 0, and the layer is what it was.

    Attributes:
        parts: the rows [begin, end) of W of each adapted part, by name.
        scale: alpha / rank.
    """

    def __init__(self, linear: nn.Linear, parts: dict[str, tuple[int, int]], rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.parts = dict(sorted(parts.items(), key=lambda part: part[1]))  # one order, so that sums have the same bits
        self.scale = alpha / rank
        options: Any = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(rank, self.in_features, **options)) for name in parts}
        )
        self.lora_B = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(end - begin, rank, **options)) for name, (begin, end) in parts.items()}
        )
        for a in self.lora_A.values():
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as peft
        self._unmerged: Tensor | None = None  # W as it was, while the product is added to it

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        y = linear(x, self.weight, self.bias)
        if self.merged:
            return y
        for name, (begin, end) in self.parts.items():
            change = linear(linear(x, self.lora_A[name]), self.lora_B[name])
            y.narrow(-1, begin, end - begin).add_(change, alpha=self.scale)
        return y

    def effective(self) -> Tensor:
        """W + scale * B @ A, for a kernel that takes the weight; differentiable in A and B."""
        if self.merged:
            return self.weight
        change = [torch.zeros_like(self.weight[:0])]
        at = 0
        for name, (begin, end) in self.parts.items():
            change.append(self.weight.new_zeros(begin - at, self.in_features))
            change.append(self.lora_B[name] @ self.lora_A[name] * self.scale)
            at = end
        change.append(self.weight.new_zeros(self.out_features - at, self.in_features))
        return self.weight + torch.cat(change)

    @property
    def merged(self) -> bool:
        """Whether the product is part of the weight now."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Add the product to the weight: the layer then costs what it did without adapters."""
        if not self.merged:
            before = self.weight.clone()
            self.weight.copy_(self.effective())
            self._unmerged = before

    @torch.no_grad()
    def unmerge(self) -> None:
        """The weight as it was before, to the bit: it was kept, not computed back."""
        if self._unmerged is not None:
            self.weight.copy_(self._unmerged)
            self._unmerged = None

    def extra_repr(self) -> str:
        rank = next(iter(self.lora_A.values())).shape[0]
        return f"{super().extra_repr()}, rank={rank}, scale={self.scale:g}, parts={list(self.parts)}"


def effective_weight(linear: nn.Linear) -> Tensor:
    """The weight that a layer multiplies with."""
    return linear.effective() if isinstance(linear, LoRALinear) else linear.weight
