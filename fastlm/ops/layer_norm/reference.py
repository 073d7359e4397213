"""Layer norm and RMS norm in plain PyTorch: the oracle of every other backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.checks import statistics_dtype


def unsupported(x, weight, bias, residual, eps, rms) -> str | None:
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    h = x if residual is None else (x.to(residual.dtype) + residual)  # (..., C)
    wide = h.to(statistics_dtype(x))
    mean = wide.mean(-1)  # (...)
    centred = wide if rms else wide - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd[..., None] * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    empty = x.new_empty(0)
    return (
        y.to(x.dtype).contiguous(),
        empty if residual is None else h.contiguous(),
        rstd[None] if rms else torch.stack([mean, rstd]),
    )


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    statistics: Tensor,
    has_bias: bool,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, rstd = statistics.dtype, statistics[-1]  # (...)
    centred = h.to(wide) if rms else h.to(wide) - statistics[0][..., None]
    xhat = centred * rstd[..., None]  # (..., C)
    d = dy.to(wide)
    g = d * weight.to(wide)
    # dh = rstd (g - mean(g) - xhat mean(g xhat)); RMS norm has no mean to differentiate through
    dwide = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if not rms:
        dwide = dwide - g.mean(-1, keepdim=True)
    dwide = dwide * rstd[..., None]
    if dh is not None:
        dwide = dwide + dh.to(wide)
    leading = tuple(range(dy.dim() - 1))
    dweight = (d * xhat).sum(leading) if leading else d * xhat
    dbias = (d.sum(leading) if leading else d) if has_bias else None
    return (
        dwide.to(dy.dtype).contiguous(),
        dwide.to(h.dtype).contiguous() if h.dtype != dy.dtype else h.new_empty(0),
        dweight.to(weight.dtype),
        dbias.to(weight.dtype).clone() if dbias is not None else weight.new_empty(0),
    )
