"""A table that is looked up and is the weight of the head too (Press & Wolf, arXiv:1608.05859): one gradient for both.

Autograd makes the gradient of each use as large as the table, and adds them up: for GPT-2 another 154 MB, and four
passes over as much. Here the rows that were looked up are added into the gradient of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import embedding as lookup
from fastlm.ops import library, registry
from fastlm.ops.embedding import _backward, _forward, _prepare


def tied_embedding(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`embedding(ids, weight)`, and the weight for its other use.

    Args:
        ids, weight: as for `fastlm.ops.embedding`.

    Returns:
        (..., C), and (V, C), the same memory as weight. Whoever uses the second instead of weight has one gradient for
        both uses; they add up in weight's dtype. It is for an op that makes its gradient anew, as the loss does: unless
        the graph is kept, the rows are added into that tensor.

    Raises:
        ValueError, UnsupportedError: as `fastlm.ops.embedding`.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
        return lookup(ids, weight), weight
    call = _prepare(ids, weight)
    return _apply(ids, weight, registry.choose("embedding", weight.device.type, call))


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, backend):  # type: ignore[override]
        ctx.save_for_backward(ids)
        ctx.vocabulary, ctx.backend = weight.shape[0], backend
        ctx.set_materialize_grads(False)
        return _forward(ids, weight, backend), weight

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dy, dhead):  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        if dy is None:
            return None, dhead, None
        if dhead is None:
            return None, _backward(dy, ids, ctx.vocabulary, -1, ctx.backend), None
        if library.graph_is_kept() or not dhead.is_contiguous():  # it may be wanted again, or be one number, expanded
            dhead = dhead.clone(memory_format=torch.contiguous_format)
        return None, _add_rows(dhead, dy, ids, ctx.backend), None


_apply = library.apply_of(_TiedEmbedding)


def _add_rows(dweight: Tensor, dy: Tensor, ids: Tensor, backend: str) -> Tensor:
    """dweight, with the gradient of a lookup added to it in a fixed order."""
    vocabulary, count = len(dweight), ids.numel()
    if count >= vocabulary:
        return dweight.add_(_backward(dy, ids, vocabulary, -1, backend))
    # The gradient of a small table instead: its rows are the ids that occur, in ascending order. There are as many as
    # places, so that nobody waits to hear how many are needed; the others stay zero.
    keys, order = ids.reshape(-1).to(torch.int64).sort(stable=True)
    slots = torch.zeros_like(keys)
    slots[1:] = (keys[1:] != keys[:-1]).cumsum(0)
    inside = (keys >= 0) & (keys < vocabulary)  # on CUDA an id out of range gets no gradient
    places = torch.empty_like(keys).index_copy_(0, order, slots.masked_fill(~inside, -1))
    rows = torch.zeros_like(keys).index_copy_(0, slots, keys.masked_fill(~inside, 0))
    return dweight.index_add_(0, rows, _backward(dy, places.view(ids.shape), count, -1, backend))
