"""The embedding in plain PyTorch: the oracle of every other backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.ops import memory
from fastlm.ops.checks import statistics_dtype


def unsupported(*call: Any) -> str | None:
    return None


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    outside = (ids < 0) | (ids >= weight.shape[0])
    if ids.is_cuda:  # an error would wait for the device
        return weight[ids.masked_fill(outside, 0)].masked_fill(outside[..., None], torch.nan)
    if outside.any():
        raise ValueError(f"embedding: id {int(ids[outside][0])} is out of range; wanted 0 to {weight.shape[0] - 1}")
    return memory.reshaped(weight.index_select(0, ids.reshape(-1)), *ids.shape, weight.shape[1])


def backward(dy: Tensor, ids: Tensor, rows: int, padding: int) -> Tensor:
    flat = ids.reshape(-1)
    counts = (flat >= 0) & (flat < rows) & (flat != padding)
    # Rows that do not count go to one more row, which is cut off. On CUDA index_put adds up in a fixed order.
    flat = flat.to(torch.int64).masked_fill(~counts, rows)
    total = dy.new_zeros(rows + 1, dy.shape[-1], dtype=statistics_dtype(dy))
    total.index_put_((flat,), dy.reshape(-1, dy.shape[-1]).to(total.dtype), accumulate=True)
    return total[:rows].to(dy.dtype).clone()
