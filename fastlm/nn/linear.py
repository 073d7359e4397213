"""nn.Linear through `fastlm.ops.linear`, where that is more than PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlm import ops

# In training, results up to this size are PyTorch's: the C library keeps memory in such sizes by itself, and a node of
# autograd in C++ costs a third of one in Python (nanoGPT's small model takes 0.97 of the time).
_SMALL_RESULT = 4 << 20  # bytes


class Linear(nn.Linear):
    """On the CPU `fastlm.ops.linear`, where it is more than PyTorch's own: for the few rows of decoding, and for large
    results. Else, on a GPU, and in a graph that torch.compile makes, PyTorch's own."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); under autocast in its dtype, else in the input's."""
        if input.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input)
        size = input.numel() // self.in_features * self.out_features * input.element_size()
        if size <= _SMALL_RESULT and torch.is_grad_enabled() and self.weight.requires_grad:
            return super().forward(input)
        return ops.linear(input, self.weight, self.bias)
