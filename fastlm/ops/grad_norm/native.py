"""The norm of gradients through fastlm._C: the C++ kernel on CPU tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import checks, library, native
from fastlm.ops.multi_tensor import chunks_of
from fastlm.ops.native import DTYPE_CODE


def unsupported(gradients: Sequence[Tensor], *rest: Any) -> str | None:
    if library.transformed():
        return "the call is traced or transformed, and the kernel is no op of the dispatcher's"
    for g in gradients:
        if g.dtype not in DTYPE_CODE:
            return f"its kernel is for float32, bfloat16 and float16, got {g.dtype}"
        if g.device != gradients[0].device:
            return f"the gradients are on several devices, {gradients[0].device} and {g.device}"
        if type(g) not in checks.PLAIN:
            return f"a gradient is a {type(g).__name__}"
    return None


def norm(gradients: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    table, _packed, chunks = table_of(gradients)
    sums = torch.empty(chunks, dtype=torch.float64, device="cpu")
    result = torch.empty(2, dtype=torch.float32, device="cpu")
    native.C.grad_norm(table, chunks, sums.data_ptr(), max_norm, result.data_ptr())
    return result[0], result[1]


def table_of(gradients: Sequence[Tensor]) -> tuple[array, list[Tensor], int]:
    """A row for each tensor (GradNormTensor of csrc/optimizer/grad_norm.h), the tensors it points to, the chunks."""
    table, chunks = array("q"), 0
    packed = [g if g.is_contiguous() else g.contiguous() for g in gradients]
    for g in packed:
        table.extend((g.data_ptr(), g.numel(), chunks, DTYPE_CODE[g.dtype]))
        chunks += chunks_of(g.numel())
    return table, packed, chunks
