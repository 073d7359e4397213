"""Rotary positions in plain PyTorch: the oracle of every other backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unsupported(*call: Any) -> str | None:
    return None


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = _of_tokens(cos, positions), _of_tokens(sin, positions)
    turned_q, turned_k = (_turn(t, cos, sin, interleaved) for t in (q, k))
    return (q.copy_(turned_q), k.copy_(turned_k)) if inplace else (turned_q, turned_k)


def backward(
    dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """A rotation's transpose is the rotation back."""
    cos, sin = _of_tokens(cos, positions), _of_tokens(sin, positions)
    turned_q, turned_k = (cos.new_empty(0) if d is None else _turn(d, cos, -sin, interleaved) for d in (dq, dk))
    return turned_q, turned_k


def _of_tokens(table: Tensor, positions: Tensor | None) -> Tensor:
    """([B,] T, R/2)"""
    if positions is None:
        return table
    outside = (positions < 0) | (positions >= table.shape[0])
    if table.is_cuda:  # an error would wait for the device
        return table[positions.masked_fill(outside, 0)].masked_fill(outside[..., None], torch.nan)
    if outside.any():
        raise ValueError(
            f"rotary: position {int(positions[outside][0])} is not a row of the tables, which have {table.shape[0]}"
        )
    return table[positions]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # ([B,] T, 1, R/2)
    turned = 2 * cos.shape[-1]
    if interleaved:
        a, b = x[..., :turned:2].to(cos.dtype), x[..., 1:turned:2].to(cos.dtype)  # (B, T, H, R/2)
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x[..., :turned].to(cos.dtype).chunk(2, dim=-1)
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((y.to(x.dtype), x[..., turned:]), dim=-1)
