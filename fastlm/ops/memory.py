"""Memory of large CPU tensors that is kept when they die, and given to the next tensor that fits.

Memory that is fresh from the system costs a page fault per 4 KB at its first use, and the C library gives every large
block back as soon as it is freed, so that each step of a training loop faults its activations in again. What the CPU
kernels return or need for a moment comes from here (csrc/common/pool.h); small tensors, and all others on the way,
from torch. A tensor of the pool is an ordinary tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C import _from_dlpack  # torch.utils.dlpack.from_dlpack, without what that asks of other arguments

from fastlm.ops import native

POOLED_BYTES = 256 << 10  # smaller tensors are torch's: the C library keeps memory in such sizes by itself
_DIMS = 8  # the most that a pooled tensor has (csrc/common/dlpack.h)
_C = native.C


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised, contiguous CPU tensor."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    if count < POOLED_BYTES or dtype not in native.DTYPE_CODE or _C is None or len(shape) > _DIMS:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return _from_dlpack(_C.pooled_tensor(tuple(shape), native.DTYPE_CODE[dtype]))


def empty_like(t: Tensor) -> Tensor:
    """An uninitialised, contiguous tensor of t's shape, dtype and device."""
    if t.is_cpu and t.nbytes >= POOLED_BYTES:
        return empty(t.shape, t.dtype)
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def reshaped(t: Tensor, *shape: int) -> Tensor:
    """t in another shape, for a result of an autograd.Function: what `view` gives could not be written to in place."""
    return torch.ops.aten._unsafe_view(t, shape)


@dataclass(frozen=True)
class State:
    """Of the pool: the bytes in use, the bytes kept unused and their limit; how many takes were served by fresh memory
    and how many by kept memory."""

    used: int
    unused: int
    limit: int
    fresh: int
    reused: int


def state() -> State:
    return State(**_C.pool_state())


def set_limit(limit: int) -> None:
    """Keep at most so many bytes while no tensor uses them. By default an eighth of the machine's memory; 0: none.

    Raises:
        ValueError: a negative limit.
    """
    if limit < 0:
        raise ValueError(f"the limit of the memory pool must be 0 or more bytes, got {limit}")
    _C.pool_set_limit(limit)


def release() -> None:
    """Give what is kept unused back to the system."""
    _C.pool_release()
