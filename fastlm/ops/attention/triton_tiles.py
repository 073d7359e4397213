"""The block sizes of attention's Triton kernels, by what is compiled: a configuration stands here where it fits.

The registers decide. A program holds sums of BLOCK x head dim in float32 (two of them where dk and dv are made) beside
two blocks of scores, and a thread has 255 registers; the larger tile that did not spill is the first choice. With
descriptors the addresses take no registers, so the tiles are larger than with pointers. Kinds of problems:
"descriptors" (the TMA reads what the loops read), "pointers", and "heavy" (softcap, ALiBi, dropout: more numbers alive
for each score, and their arithmetic hides the loads whatever the tile). float32 is three products of TF32, twice the
bytes; at a head dim of 256 no tile was found that does not spill, and triton.py refuses it. Warp specialisation is left
out: for sm_90 Triton 3.9's pass fails on these loops with four warps and does nothing with eight; for sm_100 it spills.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastlm.ops.triton_support import INTERPRETED, Config

_Tile = tuple[int, int, int, int]  # BLOCK_M, BLOCK_N, warps, stages
_Table = dict[str, tuple[_Tile, ...]]  # kind -> for padded head dims up to 64, 128, 256

_FORWARD: _Table = {
    "descriptors": ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2)),
    "pointers": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    "heavy": ((64, 32, 8, 2), (64, 32, 8, 2), (16, 32, 4, 2)),
    "float32": ((32, 32, 8, 2), (32, 16, 8, 2)),
    "amd": ((128, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1)),
    "amd heavy": ((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    "amd float32": ((32, 32, 4, 1), (32, 32, 4, 1)),
}
_COLUMNS: _Table = {
    "descriptors": ((64, 128, 8, 2), (32, 128, 8, 2), (16, 32, 8, 2)),
    "blackwell": ((32, 128, 8, 2), (32, 64, 8, 2), (16, 32, 8, 2)),  # descriptors there
    "pointers": ((32, 64, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    "heavy": ((32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1)),
    "float32": ((32, 32, 8, 1), (16, 16, 8, 2)),
    "amd": ((64, 64, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),
    "amd heavy": ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    "amd float32": ((32, 32, 4, 1), (16, 32, 4, 1)),
}
_ROWS: _Table = {
    "descriptors": ((128, 128, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    "pointers": ((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
    "heavy": ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
    "float32": ((32, 32, 8, 2), (16, 32, 8, 1)),
    "amd": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    "amd heavy": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)),
    "amd float32": ((32, 32, 4, 1), (32, 16, 4, 1)),
}


def forward(arch: str, problem: tuple[str, int, str]) -> Sequence[Config]:
    return _choose(_FORWARD, arch, problem)


def columns(arch: str, problem: tuple[str, int, str]) -> Sequence[Config]:
    dtype, width, kind = problem
    blackwell = arch == "sm_100" and kind == "descriptors"
    return _choose(_COLUMNS, arch, (dtype, width, "blackwell" if blackwell else kind))


def rows(arch: str, problem: tuple[str, int, str]) -> Sequence[Config]:
    return _choose(_ROWS, arch, problem)


def terms(arch: str, problem: tuple[str, int, str]) -> Sequence[Config]:
    """Two loads and a sum: a warp has a few rows whatever the head dim, and memory is all that counts."""
    return [Config(BLOCK_M=32 if problem[1] > (64 if arch == "sm_100" else 128) else 64, num_warps=4, num_stages=1)]


def _choose(table: _Table, arch: str, problem: tuple[str, int, str]) -> Sequence[Config]:
    dtype, width, kind = problem
    if INTERPRETED:  # its time goes by the number of blocks
        return [Config(BLOCK_M=64, BLOCK_N=128)]
    if dtype == "fp32":
        kind = "float32"
    if arch.startswith("gfx"):
        kind = {"float32": "amd float32", "heavy": "amd heavy"}.get(kind, "amd")
    m, n, warps, stages = table[kind][0 if width <= 64 else 1 if width <= 128 else 2]
    return [Config(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)]
