"""Rotary positions in Triton: a launch for the queries and one for the keys."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.ops.triton_support import FLOATS, Config, Example, Kernel, cdiv, next_power_of_2


@functools.cache
def _candidates(arch: str, problem: tuple[int, int]) -> tuple[Config, ...]:
    """Heads of one token side by side, about 1024 pairs: its angles are read once for all of them."""
    half, rest = problem
    return tuple(
        Config(HALF=half, REST=rest, HEADS=max(1, min(16, pairs // half)), num_warps=4) for pairs in (1024, 512)
    )


TURN = Kernel("fastlm.ops.rotary.triton_kernels:turn", _candidates)


def unsupported(q: Tensor, *rest: object) -> str | None:
    if q.dtype not in FLOATS:
        return f"its kernels are for float32, bfloat16 and float16, got {q.dtype}"
    if q.shape[3] > 4096:
        return f"its kernel is for heads of up to 4,096 dimensions, got {q.shape[3]}"
    return None


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    if not inplace:
        return _turned(q, cos, sin, positions, interleaved, False), _turned(k, cos, sin, positions, interleaved, False)
    for t in (q, k):
        row = t if t.stride(3) == 1 else t.contiguous()
        _turn(row, row, cos, sin, positions, interleaved, False)
        if row is not t:
            t.copy_(row)
    return q, k


def backward(
    dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """A rotation's transpose is the rotation back."""
    first, second = (
        cos.new_empty(0) if d is None else _turned(d, cos, sin, positions, interleaved, True) for d in (dq, dk)
    )
    return first, second


def _turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _turn(x if x.stride(3) == 1 else x.contiguous(), y, cos, sin, positions, interleaved, inverse)
    return y


def _turn(
    x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> None:
    batch, length, heads, width = x.shape
    half = cos.shape[-1]
    rest = width - 2 * half
    config = TURN.config(x.device, (next_power_of_2(half), next_power_of_2(rest)))
    TURN(
        config,
        (batch * length, cdiv(heads, config["HEADS"]), int(width > 0)),
        x,
        y,
        cos.contiguous(),
        sin.contiguous(),
        None if positions is None else positions.contiguous(),
        length,
        heads,
        width,
        half,
        cos.shape[0],
        length * half if cos.dim() == 3 else 0,
        length if positions is not None and positions.dim() == 2 else 0,
        *x.stride()[:3],
        *y.stride()[:3],
        interleaved,
        inverse,
        rest > 0 and y is not x,
    )


def examples(device: torch.device) -> Iterator[Example]:
    """Heads of 64 and 128 dimensions, turned whole and in part, both pairings, with and without positions."""
    for dtype, width, turned, interleaved, positions in (
        (torch.bfloat16, 64, 64, False, False),
        (torch.bfloat16, 128, 128, False, True),
        (torch.float16, 128, 32, True, False),
        (torch.float32, 64, 16, False, True),
    ):
        yield _example(device, dtype, width, turned, interleaved, positions)


def _example(
    device: torch.device, dtype: torch.dtype, width: int, turned: int, interleaved: bool, positions: bool
) -> Example:
    def call() -> None:
        q = torch.ones(2, 1024, 12, width, dtype=dtype, device=device)
        k = torch.ones(2, 1024, 4, width, dtype=dtype, device=device)
        angles = torch.ones(1024, turned // 2, device=device)
        places = torch.zeros(1024, dtype=torch.int64, device=device) if positions else None
        backward(*forward(q, k, angles, angles, places, interleaved, False), angles, angles, places, interleaved)

    return Example(f"heads of {width}, {turned} turned, {dtype}{' interleaved' if interleaved else ''}", call)
