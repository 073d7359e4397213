"""Whether the Triton backend can run here: on a GPU, or in Triton's interpreter on CPU tensors (tests)."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch

from fastlm.ops import registry

# Triton reads this variable when a kernel is decorated, so it holds for the whole process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")

OLDEST = (3, 2)  # what torch 2.6 brings


@functools.cache
def version() -> tuple[int, int]:
    """The installed Triton's, as (major, minor); (0, 0) where there is none."""
    if importlib.util.find_spec("triton") is None:
        return 0, 0
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            major, minor, *_ = importlib.metadata.version(name).split(".")
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return 0, 0


@functools.cache
def unavailable() -> str | None:
    """None where Triton kernels can run, else the reason why not."""
    if version() == (0, 0):
        return "Triton is not installed (pip install triton; torch's CUDA and ROCm builds bring it)"
    if version() < OLDEST:
        return f"Triton {'.'.join(map(str, version()))} is too old; the kernels need 3.2 or newer"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU has compute capability {major}.{minor}; the kernels need 8.0 or newer"
    return None


registry.register_backend("triton", unavailable, device_type="cpu" if INTERPRETED else "cuda")
