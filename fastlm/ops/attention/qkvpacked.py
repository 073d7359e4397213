"""Attention on a packed projection: the kernels write dq, dk and dv into one gradient.

Of `attention` on slices of a projection autograd concatenates the three: each is written and read once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import checks, library, memory, philox, registry
from fastlm.ops.attention import _OPTIONS, Window, _backward_to, _forward, _prepare, native, reference, triton


def attention_qkvpacked(
    qkv: Tensor,
    n_head: int,
    n_kv_head: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Self-attention of the queries, keys and values of one projection: `attention` on slices of it, to the bit.

    Args:
        qkv: (B, T, (H + 2 H_kv) * D), float32, bfloat16 or float16 (float64 on the reference backend): the queries of
            all heads of a token, then its keys, then its values. Any strides; where the last dimension is contiguous,
            it is read without a copy. Its gradient is contiguous.
        n_head: H.
        n_kv_head: H_kv, which divides H: query head h reads head h // (H / H_kv). None: H.
        causal, scale, window, softcap, alibi_slopes, dropout_p, cu_seqlens, max_seqlen: as for `fastlm.ops.attention`.

    Returns:
        (B, T, H, D), contiguous, in qkv's dtype. Under autocast qkv is cast to the autocast dtype.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit together.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    (qkv,) = checks.autocast(qkv)
    call = _prepare_qkvpacked(
        qkv,
        n_head,
        n_kv_head,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )
    q, k, v, alibi_slopes, cu_seqlens, _, *options = call
    backend = registry.choose("attention_qkvpacked", qkv.device.type, call)
    rng_state = philox.draw_state(qkv.device) if dropout_p > 0 else None
    arguments = (q, k, v, alibi_slopes, cu_seqlens, rng_state, *options, backend)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _apply(qkv, *arguments)
    return _forward(*arguments)[0]


def _prepare_qkvpacked(qkv, n_head, n_kv_head=None, **options) -> tuple:
    """The arguments of `attention`'s raw op. Autograd does not follow them: qkv has one gradient."""
    op = "attention_qkvpacked"
    n_kv_head = n_head if n_kv_head is None else n_kv_head
    if qkv.dim() != 3:
        raise ValueError(f"{op}: qkv must have 3 dimensions (batch, length, heads * dim), got {tuple(qkv.shape)}")
    if n_head < 1 or n_kv_head < 1 or qkv.shape[2] % (n_head + 2 * n_kv_head):
        raise ValueError(
            f"{op}: qkv must have shape (B, T, (H + 2 H_kv) * D) with H = n_head = {n_head} and H_kv = n_kv_head ="
            f" {n_kv_head}, each at least 1; got {tuple(qkv.shape)}"
        )
    (qkv,) = checks.detached(op, qkv)
    q, k, v = _heads(qkv, n_head, n_kv_head)
    return _prepare(q, k, v, **options)


def _heads(qkv: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, ...]:
    """q (B, T, H, D), k and v (B, T, H_kv, D), or their gradients, as slices of the packed tensor."""
    batch, length, width = qkv.shape
    heads = n_head + 2 * n_kv_head
    rows = qkv.view(batch, length, heads, width // heads)
    return rows.split_with_sizes((n_head, n_kv_head, n_kv_head), 2)  # `split` costs twice as much


class _AttentionQKVPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, *arguments):  # type: ignore[override]
        q, k, _, alibi_slopes, cu_seqlens, rng_state, *options = arguments
        out, lse = _forward(*arguments)
        ctx.save_for_backward(qkv, out, lse, alibi_slopes, cu_seqlens, rng_state)
        ctx.heads, ctx.options = (q.shape[2], k.shape[2]), options
        return out

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        qkv, *saved = ctx.saved_tensors
        dqkv = _backward(dout, qkv, *ctx.heads, *saved, *ctx.options)
        return dqkv, *(None,) * (6 + len(ctx.options))


_apply = library.apply_of(_AttentionQKVPacked)


def _backward_impl(dout, qkv, n_head, n_kv_head, *arguments):
    dqkv = memory.empty_like(qkv)
    _backward_to(_heads(dqkv, n_head, n_kv_head), dout, None, *_heads(qkv, n_head, n_kv_head), *arguments)
    return dqkv


def _backward_fake(dout, qkv, *arguments):
    return qkv.new_empty(qkv.shape)


# The forward pass is `attention`'s. -> dqkv, contiguous
_backward = library.define(
    "attention_qkvpacked_backward(Tensor dout, Tensor qkv, int n_head, int n_kv_head, Tensor out, Tensor lse,"
    f" {_OPTIONS}) -> Tensor",
    _backward_impl,
    _backward_fake,
)

registry.register(
    "attention_qkvpacked", _prepare_qkvpacked, reference=reference, cpu=native, cuda=native, triton=triton
)
