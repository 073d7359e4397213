"""The host's side of the kernels with a matrix product: their tiles on each architecture, and tensor descriptors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastlm.ops.triton_support import availability
from fastlm.ops.triton_support.config import Config
from fastlm.ops.triton_support.sizes import cdiv

# (BM, BN, BK, warps, stages), the best guess first. A100: what keeps the tensor cores fed from 164 KB of shared memory.
# Hopper and Blackwell: tiles of 64 along k are one swizzled row of 128 bytes of the TMA. 8.6, 8.9, 12.x: 99 KB.
# gfx942: 64 KB, and its matrix instructions want four waves.
_TILES: dict[str, Sequence[tuple[int, int, int, int, int]]] = {
    "sm_80": ((128, 128, 32, 8, 3), (128, 64, 32, 4, 4)),
    "sm_86": ((128, 128, 32, 8, 3), (64, 128, 32, 4, 3)),
    "sm_90": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4)),
    "sm_100": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4)),
    "gfx942": ((128, 128, 32, 4, 2), (64, 128, 32, 4, 2)),
}
# Few rows: the weights are read once whatever the tile, so it is as tall as the rows and more of k is under way.
_LOW: dict[str, Sequence[tuple[int, int, int, int, int]]] = {
    "sm_80": ((16, 64, 128, 4, 4),),
    "sm_86": ((16, 64, 128, 4, 3),),
    "sm_90": ((16, 64, 128, 4, 4),),
    "sm_100": ((16, 64, 128, 4, 4),),
    "gfx942": ((16, 64, 128, 4, 2),),
}
# Matrices whose rows do not start at multiples of 16 bytes are read element by element, with an address for each: small
# tiles, or the addresses alone fill the registers.
_ODD = (64, 64, 32, 8, 2)
# Up to a few hundred rows: smaller tiles, so that there are enough of them for all multiprocessors.
_MIDDLE: dict[str, Sequence[tuple[int, int, int, int, int]]] = {
    "sm_80": ((64, 64, 64, 4, 4), (64, 128, 32, 4, 4)),
    "sm_86": ((64, 64, 64, 4, 3),),
    "sm_90": ((64, 64, 64, 4, 4), (64, 128, 64, 4, 4)),
    "sm_100": ((64, 64, 64, 4, 4), (64, 128, 64, 4, 4)),
    "gfx942": ((64, 64, 32, 4, 2),),
}


def height(rows: int) -> str:
    """Which of the three tables: the only thing of the number of rows that the code may depend on."""
    return "low" if rows <= 16 else "middle" if rows <= 512 else "high"


@functools.cache
def tiles(arch: str, problem: tuple[str, int, str]) -> tuple[Config, ...]:
    """The candidates; problem = (height, outputs: how many tiles a program holds in registers, how it reads)."""
    rows, outputs, reading = problem
    found = []
    table = {"low": _LOW, "middle": _MIDDLE, "high": _TILES}[rows][arch] if reading != "odd" else (_ODD,)
    for bm, bn, bk, warps, stages in table:
        while bm * bn * outputs > 128 * 256 * warps // 8 and bn > 32:
            bn //= 2  # two sums, or what the epilogue holds, share the registers
        config = (bm, bn, bk, warps, stages)
        if config not in found:
            found.append(config)
    return tuple(
        Config(BM=bm, BN=bn, BK=bk, GROUP=8, TMA=reading == "tma", num_warps=warps, num_stages=stages)
        for bm, bn, bk, warps, stages in found
    )


def grid(config: Config, m: int, n: int) -> tuple[int, int, int]:
    return cdiv(m, config["BM"]) * cdiv(n, config["BN"]), 1, 1


def row_major(t: Tensor) -> tuple[Tensor, bool]:
    """A matrix whose inner stride is 1, and whether its rows are t's rows (else t's columns); copied where need be."""
    if t.stride(1) == 1 and t.stride(0) >= t.shape[1]:
        return t, True
    if t.stride(0) == 1 and t.stride(1) >= t.shape[0]:
        return t.T, False
    return t.contiguous(), True


def reading(arch: str, *tensors: Tensor) -> str:
    """How matrices are read: "tma", by tensor descriptors, on a Hopper GPU or newer; "pointers"; or "odd", where not
    everything is at multiples of 16 bytes."""
    if not all(map(_aligned, tensors)):
        return "odd"
    return "tma" if arch in ("sm_90", "sm_100") and availability.version() >= (3, 4) else "pointers"


def _aligned(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0


def describe(t: Tensor, block: list[int]) -> Any:
    """A tensor descriptor of a matrix, for tiles of this shape."""
    return _descriptor()(t, list(t.shape), list(t.stride()), block)


@functools.cache
def _descriptor() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor
