"""The norm of gradients by the CUDA kernel: two launches for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.ops import multi_tensor, native
from fastlm.ops.grad_norm.native import table_of
from fastlm.ops.grad_norm.native import unsupported as unsupported


def norm(gradients: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    first = gradients[0]
    table, packed, chunks = table_of(gradients)
    result = torch.empty(2, dtype=torch.float32, device=first.device)
    sums = torch.empty(chunks, dtype=torch.float64, device=first.device)
    with native.on_its_device(first):
        rows = multi_tensor.on_device(table.tobytes(), first.device)
        native.C.grad_norm_cuda(
            rows.data_ptr(), len(packed), chunks, sums.data_ptr(), max_norm, result.data_ptr(), native.stream(first)
        )
    return result[0], result[1]
