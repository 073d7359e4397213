"""The recurrence of an LSTM through fastlm._C: the C++ kernel on CPU tensors, in float32 whatever the dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import checks, memory, native
from fastlm.ops.lstm.reference import weight_gradient
from fastlm.ops.native import DTYPE_CODE, pointer


def unsupported(gates: Tensor, *rest: object) -> str | None:
    if gates.dtype not in DTYPE_CODE:
        return f"its kernel is for float32, bfloat16 and float16, got {gates.dtype}"
    return None


def forward(gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = gates.dtype
    gates, h0, c0, weight = (t.to(torch.float32).contiguous() for t in (gates, h0, c0, weight))
    batch, steps, width = gates.shape
    hidden = width // 4
    weight_address = weight.data_ptr()
    if steps == 1:  # a single product: not worth packing the weight for
        with checks.autocast_off(gates):
            gates = torch.addmm(gates[:, 0], h0, weight.T)
        weight_address = 0
    y, cells = (memory.empty((batch, steps, hidden), torch.float32) for _ in range(2))
    activations = memory.empty((batch, steps, width), torch.float32)
    workspace = memory.empty((native.C.lstm_forward_workspace(batch, hidden),), torch.float32)
    addresses = [t.data_ptr() for t in (gates, h0, c0, y, cells, activations, workspace)]
    native.C.lstm_forward([*addresses[:3], weight_address, *addresses[3:]], batch, steps, hidden)
    return y.to(dtype), cells, activations


def backward(
    dy: Tensor,
    dc: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weight: Tensor,
    y: Tensor,
    cells: Tensor,
    activations: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = dy.dtype
    batch, steps, hidden = cells.shape
    wide = [None if t is None else t.to(torch.float32).contiguous() for t in (dy, dc, c0, cells, activations, weight)]
    dgates = memory.empty_like(activations)
    dh0, dc0 = cells.new_empty(batch, hidden), cells.new_empty(batch, hidden)
    workspace = memory.empty((native.C.lstm_backward_workspace(batch, hidden),), torch.float32)
    addresses = [pointer(t) for t in (*wide, dgates, dh0, dc0, workspace)]
    native.C.lstm_backward(addresses, batch, steps, hidden)
    with checks.autocast_off(dy):
        dweight = weight_gradient(dgates, h0, y)
    return dgates.to(dtype), dh0.to(dtype), dc0.to(dtype), dweight.to(weight.dtype)
