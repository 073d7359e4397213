"""Sums down the columns of partial results, in a fixed order."""

from __future__ import annotations

import functools

from torch import Tensor

from fastlm.ops.triton_support.kernel import Config, Kernel
from fastlm.ops.triton_support.sizes import cdiv


@functools.cache
def _candidates(arch: str, problem: tuple) -> tuple[Config, ...]:
    # 32 columns of float32 are a line of 128 bytes; the 16 rows side by side hide the memory's latency.
    return (Config(ROWS=16, COLUMNS=32, num_warps=4),)


COLUMN_SUM = Kernel("fastlm.ops.triton_support.column_sum_kernels:column_sum", _candidates)


def column_sum(partial: Tensor, total: Tensor, other: Tensor | None = None) -> None:
    """total = partial[0].sum(0), other = partial[1].sum(0); partial is (1 or 2, rows, width) float32, contiguous."""
    matrices, rows, width = partial.shape
    config = COLUMN_SUM.config(partial.device, ())
    COLUMN_SUM(config, (cdiv(width, config["COLUMNS"]), matrices, 1), partial, total, other, rows, width)
