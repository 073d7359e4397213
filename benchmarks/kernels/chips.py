"""The published limits of the GPUs, and what follows from them for a kernel: occupancy and roofline."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Limits as NVIDIA publishes them: rates of dense matrix products, not of sparse ones, at the boost clock."""

    name: str
    arch: str
    multiprocessors: int
    tensor_flops: float  # bf16 and fp16 with fp32 sums, a second
    tf32_flops: float
    bandwidth: float  # of the memory, bytes a second
    shared: int  # bytes of a multiprocessor, those that the system takes of every block included
    mma_cycles: int  # of a scheduler's tensor core, for mma.m16n8k16 in bf16 or mma.m16n8k8 in tf32
    mma_sync: float  # the part of the tensor cores' rate that mma.sync reaches; the rest takes wgmma
    source: str


A100 = Chip(
    "A100 SXM 80 GB",
    "sm_80",
    108,
    312e12,
    156e12,
    2.039e12,
    164 * 1024,
    8,
    1.0,
    "NVIDIA A100 Tensor Core GPU data sheet (2021)",
)
H100 = Chip(
    "H100 SXM 80 GB",
    "sm_90a",
    132,
    989.4e12,
    494.7e12,
    3.35e12,
    228 * 1024,
    4,
    0.629,
    "NVIDIA H100 Tensor Core GPU data sheet; mma.sync: arXiv:2402.13499",
)
CHIPS = {chip.arch: chip for chip in (A100, H100)}

# CUDA C++ Programming Guide, technical specifications per compute capability: the same for 8.0 and 9.0.
THREADS, BLOCKS, REGISTERS = 2048, 32, 65536  # of a multiprocessor
REGISTER_UNIT = 256  # registers are given to a warp by so many
SCHEDULERS = 4
SHARED_UNIT, SHARED_OF_SYSTEM = 128, 1024  # bytes: the unit, and what the system takes of each block


def occupancy(chip: Chip, registers: int, threads: int, shared: int) -> tuple[int, float]:
    """Blocks on a multiprocessor, and the share of its 2,048 threads that they are.

    Args:
        registers: of a thread.
        threads: of a block.
        shared: bytes of a block, static and dynamic.
    """
    warps = math.ceil(threads / 32)
    warp_registers = math.ceil(max(registers, 1) * 32 / REGISTER_UNIT) * REGISTER_UNIT
    block_shared = math.ceil((shared + SHARED_OF_SYSTEM) / SHARED_UNIT) * SHARED_UNIT
    by_registers = REGISTERS // warp_registers // warps
    blocks = min(BLOCKS, THREADS // (32 * warps), by_registers, chip.shared // block_shared)
    return blocks, blocks * warps * 32 / THREADS


def issue_limit(chip: Chip, products: int, instructions: int) -> float:
    """The most that the tensor cores can be busy in a loop of so many instructions, of which some are `mma.sync`: a
    scheduler issues one instruction a cycle."""
    return min(1.0, products * chip.mma_cycles / instructions)


def shared_limit(chip: Chip, products: int, wavefronts: int) -> float:
    """The most that the tensor cores can be busy in a loop that moves 128 bytes so often to and from shared memory. It
    has 32 banks of 4 bytes a cycle (CUDA C++ Programming Guide), for the warps of all four schedulers."""
    return min(1.0, products * chip.mma_cycles / (SCHEDULERS * wavefronts)) if wavefronts else 1.0


def wgmma_shared_limit(columns: int) -> float:
    """`shared_limit` of a loop of wgmma 64 x columns x 16, both operands 16-bit and in shared memory: each takes
    columns / 2 cycles of a multiprocessor, and reads 32 bytes of each of 64 rows and of the columns."""
    return min(1.0, columns / 2 / ((64 + columns) * 32 / 128))


def roofline(
    chip: Chip,
    bytes_moved: float,
    flops: float,
    tf32: bool = False,
    busy: float = 1.0,
    shared: float = 1.0,
    wgmma: bool = False,
) -> tuple[float, str]:
    """Seconds that a kernel needs at least, and which limit it is.

    Args:
        wgmma: its products are not by mma.sync.
        busy: the most that its tensor cores can be busy, from `issue_limit`.
        shared: the same from `shared_limit`.
    """
    reached, limit = min(
        (1.0 if wgmma else chip.mma_sync, "matrix products"),
        (busy, "issued instructions"),
        (shared, "shared memory"),
        key=lambda x: x[0],
    )
    by_memory = bytes_moved / chip.bandwidth
    by_tensor = flops / (reached * (chip.tf32_flops if tf32 else chip.tensor_flops))
    if by_memory >= by_tensor:
        return by_memory, "memory"
    return by_tensor, limit
