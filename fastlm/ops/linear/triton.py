"""The linear layer beside the Triton kernels: a product without an epilogue, which is left to PyTorch's library."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.ops.linear.reference import backward, forward
from fastlm.ops.triton_support import FLOATS, Example

__all__ = ["backward", "examples", "forward", "unsupported"]


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dtype not in FLOATS:
        return f"it is for float32, bfloat16 and float16, got {x.dtype}"
    return None


def examples(device: torch.device) -> Iterator[Example]:
    """None: there is no kernel to compile or to tune."""
    yield from ()
