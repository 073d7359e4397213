"""nn.Linear through `fastlm.ops.linear`, where that is more than PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import ops
from fastlm.ops import products

# In training, results up to this size are PyTorch's: the C library keeps memory in such sizes by itself, and a node of
# autograd in C++ costs a third of one in Python (nanoGPT's small model takes 0.97 of the time).
_SMALL_RESULT = 2 << 20  # bytes


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, and `fastlm.ops.linear` where that is more: on a GPU where the bias has a gradient; on the CPU for the
    few rows of decoding, for large results, and where PyTorch's product is slow (`products.slow_library`). In a graph
    of torch.compile it is PyTorch's."""
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        return F.linear(x, weight, bias)
    if x.is_cuda:
        trains = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        return ops.linear(x, weight, bias) if trains else F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        size = x.numel() // weight.shape[1] * weight.shape[0] * x.element_size()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if size <= _SMALL_RESULT and not products.slow_library(dtype, x.numel() * weight.shape[0]):
            return F.linear(x, weight, bias)
    return ops.linear(x, weight, bias)


class Linear(nn.Linear):
    """(..., in_features) -> (..., out_features) by `linear`; under autocast in its dtype, else in the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
