"""The embedding: rows of a table by their number, and the table's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import checks, library, registry
from fastlm.ops import native as compiled
from fastlm.ops.embedding import native, reference, triton


def embedding(ids: Tensor, weight: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """weight[ids]. The gradient of each row is a sum in a fixed order, in float32: two runs give the same bits.

    Args:
        ids: any shape (...), int64 or int32, from 0 to V - 1. On the CPU another id is an error; on CUDA looking for
            one would wait for the device, and it gives a row of NaN and no gradient.
        weight: (V, C), float32, bfloat16 or float16 (float64 on the reference backend).
        padding_idx: this row gets no gradient (as in torch.nn.functional.embedding); negative: counted from the end.

    Returns:
        (..., C), contiguous, in weight's dtype. Autocast changes nothing here.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; on the CPU: an id is out of range.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    call = _prepare(ids, weight, padding_idx=padding_idx)
    recorded = torch.is_grad_enabled() and weight.requires_grad
    if compiled.takes_tensors():
        y = compiled.C.embedding_forward_torch(ids, weight)
        if y is not None:
            return _record(*call, ("cpu", y)) if recorded else y
    backend = registry.choose("embedding", weight.device.type, call)
    return _apply(*call, (backend, None)) if recorded else _forward(ids, weight, backend)


def _prepare(ids: Tensor, weight: Tensor, *, padding_idx: int | None = None) -> tuple:
    """Check the contract; ids, weight, and the padding row or -1."""
    op = "embedding"
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: ids must be int64 or int32, got {ids.dtype}")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"{op}: weight must have shape (V, C) with C > 0, got {tuple(weight.shape)}")
    if weight.dtype not in checks.FLOATS:
        checks.floating(op, weight=weight)
    if ids.device != weight.device:
        checks.same_device(op, "weight", weight, ids=ids)
    rows = weight.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"{op}: padding_idx must be from {-rows} to {rows - 1}, got {padding_idx}")
    return ids, weight, -1 if padding_idx is None else padding_idx % rows


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, padding, result):  # type: ignore[override]
        backend, y = result  # in a tuple: autograd would take a tensor that is both argument and result for a view
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding, ctx.backend = weight.shape[0], padding, backend
        return _forward(ids, weight, backend) if y is None else y

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        return None, _backward(dy, ids, ctx.rows, ctx.padding, ctx.backend), None, None


_apply, _record = library.apply_of(_Embedding), library.plain_apply_of(_Embedding)


def _forward_impl(ids, weight, backend):
    return registry.implementation("embedding", backend).forward(ids, weight)


def _forward_fake(ids, weight, backend):
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _backward_impl(dy, ids, rows, padding, backend):
    return registry.implementation("embedding", backend).backward(dy, ids, rows, padding)


def _backward_fake(dy, ids, rows, padding, backend):
    return dy.new_empty((rows, dy.shape[-1]))


_forward = library.define(
    "embedding_forward(Tensor ids, Tensor weight, str backend) -> Tensor", _forward_impl, _forward_fake
)
# dweight (rows, C) in dy's dtype
_backward = library.define(
    "embedding_backward(Tensor dy, Tensor ids, SymInt rows, SymInt padding, str backend) -> Tensor",
    _backward_impl,
    _backward_fake,
)

registry.register("embedding", _prepare, reference=reference, cpu=native, cuda=native, triton=triton)
