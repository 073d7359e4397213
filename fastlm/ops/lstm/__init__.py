"""The recurrence of an LSTM over a whole sequence.

Hochreiter, Schmidhuber: Long Short-Term Memory (Neural Computation 9(8), 1997).
Gers, Schmidhuber, Cummins: Learning to Forget (Neural Computation 12(10), 2000): the forget gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import checks, library, registry
from fastlm.ops.lstm import native, reference, triton


def lstm(gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Run the recurrence of one LSTM layer over T steps.

        i, f, g, o = gates[:, t] + h @ weight.T          (in this order, as in torch.nn.LSTM)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g);   h = sigmoid(o) * tanh(c)

    Args:
        gates: (B, T, 4H), the input's part of the gates with all biases: `F.linear(x, weight_ih, bias)`. float32,
            bfloat16 or float16 (float64 on the reference backend); T at least 1.
        h0, c0: (B, H), the hidden state and the cell before the first step.
        weight: (4H, H), the recurrent weight (torch.nn.LSTM's weight_hh).

    Returns:
        y (B, T, H), the hidden states, and c (B, H), the cell after the last step; the last hidden state is y[:, -1].
        Cells and gates are kept in float32 on the way. Autocast: everything is taken to float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    if checks.autocast_is_on(gates.device.type) and gates.dtype != torch.float64:
        gates, h0, c0, weight = (t.float() for t in (gates, h0, c0, weight))
    return _run(*_prepare(gates, h0, c0, weight))


def _prepare(gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor) -> tuple:
    """Check the contract; the arguments of the raw op."""
    op = "lstm"
    checks.floating(op, gates=gates)
    if gates.dim() != 3:
        raise ValueError(f"{op}: gates must have shape (B, T, 4H), got {tuple(gates.shape)}")
    batch, steps, width = gates.shape
    if width == 0 or width % 4:
        raise ValueError(f"{op}: the last dimension of gates must be 4H, a multiple of 4, got {width}")
    if steps == 0:
        raise ValueError(f"{op}: gates must have at least one step, got shape {tuple(gates.shape)}")
    checks.same_device(op, "gates", gates, h0=h0, c0=c0, weight=weight)
    checks.same_dtype(op, "gates", gates, h0=h0, c0=c0, weight=weight)
    checks.shape(op, "h0", h0, (batch, width // 4), "(B, H)")
    checks.shape(op, "c0", c0, (batch, width // 4), "(B, H)")
    checks.shape(op, "weight", weight, (width, width // 4), "(4H, H)")
    return gates, h0, c0, weight


def _run(gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    backend = registry.choose("lstm", gates.device.type, (gates, h0, c0, weight))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (gates, h0, c0, weight)):
        return _apply(gates, h0, c0, weight, backend)
    y, cells, _ = _forward(gates, h0, c0, weight, backend)
    return y, cells[:, -1].to(gates.dtype)


class _Lstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates, h0, c0, weight, backend):  # type: ignore[override]
        y, cells, activations = _forward(gates, h0, c0, weight, backend)
        ctx.backend = backend
        ctx.save_for_backward(h0, c0, weight, y, cells, activations)
        ctx.set_materialize_grads(False)
        return y, cells[:, -1].to(gates.dtype, copy=True)

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dy, dc):  # type: ignore[override]
        h0, c0, weight, y, cells, activations = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(y)
        return (*_backward(dy, dc, h0, c0, weight, y, cells, activations, ctx.backend), None)


_apply = library.apply_of(_Lstm)


def _forward_impl(gates, h0, c0, weight, backend):
    return registry.implementation("lstm", backend).forward(gates, h0, c0, weight)


def _forward_fake(gates, h0, c0, weight, backend):
    batch, steps, width = gates.shape
    kept = checks.statistics_dtype(gates)
    return (
        gates.new_empty((batch, steps, width // 4)),
        gates.new_empty((batch, steps, width // 4), dtype=kept),
        gates.new_empty((batch, steps, width), dtype=kept),
    )


def _backward_impl(dy, dc, h0, c0, weight, y, cells, activations, backend):
    return registry.implementation("lstm", backend).backward(dy, dc, h0, c0, weight, y, cells, activations)


def _backward_fake(dy, dc, h0, c0, weight, y, cells, activations, backend):
    dtype = dy.dtype
    return (
        activations.new_empty(activations.shape, dtype=dtype),
        h0.new_empty(h0.shape),
        c0.new_empty(c0.shape),
        weight.new_empty(weight.shape),
    )


# y (B, T, H); the cells (B, T, H) and the gates after their functions (B, T, 4H): i, f, g, o, float32
_forward = library.define(
    "lstm_forward(Tensor gates, Tensor h0, Tensor c0, Tensor weight, str backend) -> (Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
# dgates, dh0, dc0, dweight
_backward = library.define(
    "lstm_backward(Tensor dy, Tensor? dc, Tensor h0, Tensor c0, Tensor weight, Tensor y, Tensor cells,"
    " Tensor activations, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)

registry.register("lstm", _prepare, reference=reference, cpu=native, triton=triton)
