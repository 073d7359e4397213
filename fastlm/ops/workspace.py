"""Scratch memory of the CPU kernels, kept from call to call.

Memory that is fresh from the system costs a page fault per 4 KB at its first use, and PyTorch gives large tensors back
to the system when they die. So what an op needs only while it runs is borrowed here.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

KEPT_BYTES = 128 << 20  # of all buffers together, while nobody uses them
_free: list[Tensor] = []
_lock = threading.Lock()


class borrowed:  # a class costs half of what @contextmanager does
    """An uninitialised contiguous CPU tensor of this shape and dtype, to be used inside the `with` block only."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def __enter__(self) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        self.buffer = _take(size)
        return self.buffer[:size].view(self.dtype).view(self.shape)

    def __exit__(self, *exception: object) -> None:
        _give(self.buffer)


def _take(size: int) -> Tensor:
    with _lock:
        fitting = [i for i, b in enumerate(_free) if b.numel() >= size]
        if fitting:
            return _free.pop(min(fitting, key=lambda i: _free[i].numel()))
    return torch.empty(max(size, 1), dtype=torch.uint8)


def _give(buffer: Tensor) -> None:
    with _lock:
        _free.append(buffer)
        while sum(b.numel() for b in _free) > KEPT_BYTES:
            _free.pop(0)  # the one that has lain there longest


def release() -> None:
    """Give the kept memory back to the system."""
    with _lock:
        _free.clear()
