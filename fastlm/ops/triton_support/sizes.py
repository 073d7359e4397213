"""The dtypes of the kernels, and small arithmetic of launches."""

from __future__ import annotations

import torch
from torch import Tensor

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FLOATS = tuple(_NAMES)  # the dtypes of the kernels


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def dtype_name(t: Tensor) -> str:
    """fp32, fp16 or bf16."""
    return _NAMES[t.dtype]
