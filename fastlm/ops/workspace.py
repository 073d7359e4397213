"""Scratch memory of the CPU kernels, kept from call to call.

Memory that is fresh from the system costs a page fault per 4 KB at its first use, and PyTorch gives large tensors back
to the system when they die. So what an op needs only while it runs is borrowed here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

KEPT_BYTES = 128 << 20  # of all buffers together, while nobody uses them
_free: list[Tensor] = []
_lock = threading.Lock()


@contextmanager
def borrowed(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """An uninitialised contiguous CPU tensor, to be used inside the `with` block only."""
    count = 1
    for n in shape:
        count *= n
    size = count * dtype.itemsize
    buffer = _take(size)
    try:
        yield buffer[:size].view(dtype).view(shape)
    finally:
        _give(buffer)


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
