"""nn.Linear through `fastlm.ops.linear`, where that is more than PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlm import ops


class Linear(nn.Linear):
    """On the CPU `fastlm.ops.linear`; on a GPU, and in a graph that torch.compile makes, PyTorch's own."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); under autocast in its dtype, else in the input's."""
        if input.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input)
        return ops.linear(input, self.weight, self.bias)
