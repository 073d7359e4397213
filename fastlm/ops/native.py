"""What every op's native.py shares: the compiled module, dtype codes, pointers and rows."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import library, mkl, registry

PACKAGE = Path(__file__).parents[1]


def _why_missing(error: ImportError) -> str:
    if not PACKAGE.is_dir() or any((PACKAGE / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return str(error)
    builds = ", ".join(sorted(p.name for p in PACKAGE.glob("_C.*")))
    if builds:
        return f"{PACKAGE} was built for another Python ({builds})"
    return (
        f"{PACKAGE} is a source tree that was not built: start Python in another folder, where the installed fastlm is "
        "found, or build this one (`pip install -e .`)"
    )


try:
    from fastlm import _C as _compiled  # type: ignore[attr-defined]

    IMPORT_ERROR: str | None = None
except ImportError as error:
    _compiled = None
    IMPORT_ERROR = _why_missing(error)

mkl.fix_order()

C: Any = _compiled  # the module that the kernels are called through

DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/common/dtype.h


@functools.cache
def cpu_unavailable() -> str | None:
    if C is None:
        return f"the compiled module fastlm._C is not there ({IMPORT_ERROR})"
    try:
        C.cpu_isa()
    except Exception as error:  # an instruction set was forced that this processor lacks
        return str(error)
    return None


@functools.cache
def cuda_unavailable() -> str | None:
    if C is None:
        return f"the compiled module fastlm._C is not there ({IMPORT_ERROR})"
    built = C.build_info()
    if not built["cuda"]:
        return f"fastlm was built without CUDA: {built['cuda_reason']}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU has compute capability {major}.{minor}; the kernels need 8.0 or newer"
    return None


registry.register_backend("cpu", cpu_unavailable)
registry.register_backend("cuda", cuda_unavailable)


@functools.cache
def reads_tensors() -> bool:
    """Whether fastlm._C can read and make this torch's CPU tensors (csrc/common/torch_tensor.h): from torch 2.10."""
    return cpu_unavailable() is None and C.connect_torch(Tensor, torch.nn.Parameter)


def takes_tensors() -> bool:
    """Whether a call may go to the functions of fastlm._C that take tensors: nobody looks or forced another backend.

    Those functions check the contract themselves, and return None for what is out of the ordinary, GPU tensors too.
    """
    return not library.watched() and registry.may_run("cpu") and reads_tensors()


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def on_cuda(t: Tensor) -> bool:
    """Whether the CUDA kernels take this tensor. (The tests' emulator runs them on CPU tensors.)"""
    return t.is_cuda


def stream(t: Tensor) -> int:
    """The raw current CUDA stream of the tensor's device; 0 on the CPU."""
    return torch._C._cuda_getCurrentRawStream(t.device.index) if t.is_cuda else 0


def on_its_device(t: Tensor) -> AbstractContextManager:
    """Inside it the tensor's GPU is the current one, which kernels are launched on."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


@functools.cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _runs_wgmma(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0) and "90a" in C.build_info()["cuda_archs"]


def has_wgmma(t: Tensor) -> bool:
    """Whether the kernels of wgmma can run on the tensor's GPU: compute capability 9.0, built for sm_90a."""
    return t.is_cuda and _runs_wgmma(t.device.index)


def gemm_device(t: Tensor) -> tuple[int, bool]:
    """The multiprocessors of the tensor's GPU, and `has_wgmma`; (0, False) on the CPU."""
    return (multiprocessors(t.device.index), has_wgmma(t)) if t.is_cuda else (0, False)


def rows(t: Tensor) -> tuple[Tensor, int]:
    """The tensor and the distance between its rows, in elements: rows are contiguous and equally far apart.

    A tensor (..., C) whose leading dimensions do not fold into one is copied.
    """
    width = t.shape[-1]
    if t.is_contiguous():
        return t, width
    try:
        flat = t.view(-1, width)
    except RuntimeError:
        return t.contiguous(), width
    if flat.stride(1) != 1 and width > 1:
        return t.contiguous(), width
    return flat, flat.stride(0)
