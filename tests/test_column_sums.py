"""The bias gradient's kernels, on the CPU, the emulator and a GPU: shapes that the op suite does not have."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from fastlm.ops import native
from fastlm.ops.gradients import bias_gradient
from tests.emulator import backend as emulator


@pytest.mark.parametrize("on", ["cpu", "emulator", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "cols", "stride"),
    [(1, 1, 1), (0, 9, 9), (129, 264, 264), (700, 300, 304), (33, 7, 11), (40000, 8, 8), (131, 300, 301)],
)
def test_column_sums(on: str, dtype: torch.dtype, rows: int, cols: int, stride: int) -> None:
    reason = {"cpu": native.cpu_unavailable, "emulator": emulator.unavailable, "cuda": native.cuda_unavailable}[on]()
    if reason is not None:
        pytest.skip(reason)
    x = torch.randn(rows, stride, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :cols]
    x = x.cuda() if on == "cuda" else x
    with emulator.emulated() if on == "emulator" else nullcontext():
        got = bias_gradient(x, dtype)
    assert got.dtype == dtype
    scale = x.double().abs().sum(0)
    unit = torch.finfo(dtype).eps * (x.double().sum(0).abs() + 1e-6 * scale) + 1e-6 * scale
    assert ((got.double() - x.double().sum(0)).abs() <= unit).all()
