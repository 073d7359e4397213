"""The architectures that configurations are listed for, and which of them a device is."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# sm_80: A100. sm_86: 8.6, 8.9 and 12.x, which have 99 KB of shared memory. sm_90: H100. sm_100: B200. gfx942: MI300.
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")

# What one block of threads may use. A configuration that needs more must not be among the candidates.
SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

_MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304}
_pretended: str | None = None


@contextmanager
def pretend(arch: str) -> Iterator[None]:
    """Inside, a tensor on the meta device counts as one on this architecture."""
    global _pretended
    previous, _pretended = _pretended, arch
    try:
        yield
    finally:
        _pretended = previous


def architecture(device: torch.device) -> str:
    """The architecture whose configurations fit the device; in the interpreter sm_80."""
    if device.type == "cuda":
        return _of_gpu(device.index)
    return _pretended if device.type == "meta" and _pretended is not None else "sm_80"


@functools.cache
def _of_gpu(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"  # the smallest shared memory of AMD's; others take its configurations
    major, minor = torch.cuda.get_device_capability(index)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_86")


def multiprocessors(device: torch.device) -> int:
    """How many there are: what a kernel with a fixed grid counts by. In the interpreter two, so that small tests have
    several turns of its loop."""
    if device.type == "cuda":
        return _count(device.index)
    return _MULTIPROCESSORS[architecture(device)] if device.type == "meta" else 2


@functools.cache
def _count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
