"""The recurrence of an LSTM in plain PyTorch, forward and backward spelled out: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import checks


def unsupported(*call: object) -> str | None:
    return None


def forward(gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, kept = gates.dtype, checks.statistics_dtype(gates)
    h, c, weight = h0.to(kept), c0.to(kept), weight.to(kept)
    states, cells, activations = [], [], []
    with checks.autocast_off(gates):
        for x in gates.unbind(1):  # (B, 4H)
            z_in, z_forget, z_cell, z_out = (x.to(kept) + h @ weight.T).chunk(4, -1)
            i, f, g, o = z_in.sigmoid(), z_forget.sigmoid(), z_cell.tanh(), z_out.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            states.append(h)
            cells.append(c)
            activations.append(torch.cat((i, f, g, o), -1))
    return torch.stack(states, 1).to(dtype), torch.stack(cells, 1), torch.stack(activations, 1)


def backward(
    dy: Tensor,
    dc_last: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weight: Tensor,
    y: Tensor,
    cells: Tensor,
    activations: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, kept = dy.dtype, cells.dtype
    w = weight.to(kept)
    dh_next = torch.zeros_like(h0, dtype=kept)
    dc = torch.zeros_like(dh_next) if dc_last is None else dc_last.to(kept)
    before = torch.cat((c0.to(kept)[:, None], cells[:, :-1]), 1)  # c_{t-1}
    dgates = torch.empty_like(activations)
    with checks.autocast_off(dy):
        for t in range(cells.shape[1] - 1, -1, -1):
            i, f, g, o = activations[:, t].chunk(4, -1)
            squashed = cells[:, t].tanh()
            dh = dy[:, t].to(kept) + dh_next
            dc = dc + dh * o * (1 - squashed.square())
            parts = (
                dc * g * i * (1 - i),
                dc * before[:, t] * f * (1 - f),
                dc * i * (1 - g * g),
                dh * squashed * o * (1 - o),
            )
            dgates[:, t] = torch.cat(parts, -1)
            dh_next = dgates[:, t] @ w
            dc = dc * f
        dweight = weight_gradient(dgates, h0, y)
    return dgates.to(dtype), dh_next.to(dtype), dc.to(dtype), dweight.to(weight.dtype)


def weight_gradient(dgates: Tensor, h0: Tensor, y: Tensor) -> Tensor:
    """The sum over batch and steps of dgates_t h_{t-1}^T, (4H, H): one matrix product."""
    before = torch.cat((h0[:, None], y[:, :-1]), 1).to(dgates.dtype)  # h_{t-1}
    return dgates.flatten(0, 1).T @ before.flatten(0, 1)
