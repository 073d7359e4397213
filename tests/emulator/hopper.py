"""What the tests of Hopper's kernels share: they run on the emulator, and on a GPU of compute capability 9.0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastlm.ops import native
from tests.emulator import backend as emulator


def sixteen_bit(test: Callable) -> Callable:
    return pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])(test)


def device_of(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the tensors for "emulator" or "cuda" lie; skips the test where that has not Hopper's instructions."""
    on_emulator = backend == "emulator"
    reason = emulator.unavailable() if on_emulator else native.cuda_unavailable()
    if reason is None and not on_emulator and not native.has_wgmma(torch.empty(0, device="cuda")):
        reason = "the GPU is not of compute capability 9.0, or fastlm was built without sm_90a"
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(emulator, "HOPPER", True)
    return "cpu" if on_emulator else "cuda"
