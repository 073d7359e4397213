"""Attention: softmax(scores) @ v, without keeping the scores for the backward pass.

Vaswani et al.: Attention Is All You Need (arXiv:1706.03762).
Dao: FlashAttention-2 (arXiv:2307.08691): online softmax; the backward pass recomputes the scores from the saved lse.
Press, Smith, Lewis: Train Short, Test Long (ALiBi, arXiv:2108.12409). Gemma 2 (arXiv:2408.00118): soft-capped scores.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastlm.ops import checks, library, memory, philox, registry
from fastlm.ops.attention import native, reference, triton

Window = tuple[int | None, int | None]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    dropout_p: float = ...,
    cu_seqlens: Tensor | None = ...,
    max_seqlen: int | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    dropout_p: float = ...,
    cu_seqlens: Tensor | None = ...,
    max_seqlen: int | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head attention: dropout(softmax(mask(alibi + softcap(scale * q @ k^T)))) @ v.

    Args:
        q: (B, T, H, D), float32, bfloat16 or float16 (float64 on the reference backend). Any strides; views whose last
            dimension is contiguous, such as slices of one (B, T, 3, H, D) projection, are read without a copy.
        k, v: (B, S, H_kv, D) of q's dtype, where H_kv divides H: query head h reads head h // (H / H_kv).
        causal: row i sees only the columns j <= i + S - T (the last row sees everything).
        scale: factor on the scores; None: 1 / sqrt(D).
        window: (left, right): row i sees only i + S - T - left <= j <= i + S - T + right. None or -1: no bound there.
        softcap: where positive, scores become softcap * tanh(scores / softcap).
        alibi_slopes: (H) or (B, H); adds -slope * |i + S - T - j| to the scores. Read in float32; gets no gradient.
        dropout_p: probability in [0, 1) with which each softmax weight is dropped (the others are scaled by
            1 / (1 - p)). The mask comes from torch's default generator of the device: `torch.manual_seed` repeats it.
        cu_seqlens: (n + 1) int32 on q's device, 0 = cu_seqlens[0] <= ... <= cu_seqlens[n] = T: the boundaries of n
            sequences packed into one (B = 1, T = S), each of which attends to itself alone. On the CPU the values are
            checked; on CUDA they are not (that would wait for the device), and wrong ones give wrong results.
        max_seqlen: the length of the longest packed sequence, or more. Backends on the CPU need none; on CUDA, T is
            assumed without it, which is right but launches work that finds nothing to do.
        return_lse: also return the logarithms of the softmax denominators.

    Returns:
        (B, T, H, D), contiguous, in q's dtype; with `return_lse` also lse (B, H, T) float32 (float64 for float64), the
        natural logarithm of the sum of exponentials of the scaled, capped, biased, masked scores, differentiable.
        A row with nothing to attend to gives zeros, lse -inf, and no gradient. Softmax and sums are taken in float32.
        Under autocast q, k and v are cast to the autocast dtype.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit together.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    call = _prepare(q, k, v, causal, scale, window, softcap, alibi_slopes, dropout_p, cu_seqlens, max_seqlen)
    q, k, v, alibi_slopes, cu_seqlens, _, *options = call
    backend = registry.choose("attention", q.device.type, call)
    rng_state = philox.draw_state(q.device) if dropout_p > 0 else None
    arguments = (q, k, v, alibi_slopes, cu_seqlens, rng_state, *options, backend)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _apply(*arguments)
    else:
        out, lse = _forward(*arguments)
    return (out, lse) if return_lse else out


def _prepare(
    q,
    k,
    v,
    causal=False,
    scale=None,
    window=None,
    softcap=0.0,
    alibi_slopes=None,
    dropout_p=0.0,
    cu_seqlens=None,
    max_seqlen=None,
    return_lse=False,
) -> tuple[Any, ...]:
    """Check the contract; the arguments of the raw op, with None in the place of rng_state.

    Plain conditions stand in front of the checks that word the errors: calls cost time in each step of decoding.
    """
    op = "attention"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        name, t = next((n, t) for n, t in (("q", q), ("k", k), ("v", v)) if t.dim() != 4)
        raise ValueError(f"{op}: {name} must have 4 dimensions (batch, length, heads, dim), got {tuple(t.shape)}")
    q, k, v = checks.autocast(q, k, v)
    batch, length, heads, width = q.shape
    k_batch, columns, kv_heads, k_width = k.shape
    dtype, device = q.dtype, q.device
    if dtype not in checks.FLOATS or k.dtype != dtype or v.dtype != dtype:
        checks.floating(op, q=q, k=k, v=v)
        checks.same_dtype(op, "q", q, k=k, v=v)
    if k.device != device or v.device != device or alibi_slopes is not None or cu_seqlens is not None:
        checks.same_device(op, "q", q, k=k, v=v, alibi_slopes=alibi_slopes, cu_seqlens=cu_seqlens)
    if k_batch != batch or k_width != width:
        raise ValueError(
            f"{op}: k must have shape (B, S, H_kv, D) = ({batch}, S, H_kv, {width}) to go with q {tuple(q.shape)},"
            f" got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        checks.shape(op, "v", v, k.shape, "of k")
    if width == 0 or heads == 0:
        raise ValueError(f"{op}: the number of heads and the head dim must not be 0, got q of shape {tuple(q.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: the heads of k and v must divide those of q, got {kv_heads} and {heads}")
    scale = width**-0.5 if scale is None else float(scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    left, right = (-1, -1) if window is None else _window(op, window)
    if causal:
        right = 0
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap must be 0 (none) or positive, got {softcap}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if alibi_slopes is not None:
        alibi_slopes = _slopes(op, alibi_slopes, batch, heads, q)
    if cu_seqlens is not None:
        _check_packed(op, batch, length, columns, cu_seqlens)
        cu_seqlens = cu_seqlens.contiguous()
    if max_seqlen is None:
        max_seqlen = length
    elif cu_seqlens is None:
        raise ValueError(f"{op}: max_seqlen goes with cu_seqlens, got max_seqlen={max_seqlen} alone")
    elif max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen must not be negative, got {max_seqlen}")
    options = (scale, left, right, float(softcap), float(dropout_p), max_seqlen)
    return q, k, v, alibi_slopes, cu_seqlens, None, *options


def _window(op: str, window: Window) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"{op}: window must be None or (left, right), got {window!r}")
    left, right = (-1 if side is None else side for side in window)
    if left < -1 or right < -1:
        raise ValueError(f"{op}: a side of window is a length, or None or -1 for no bound, got {window!r}")
    return int(left), int(right)


def _slopes(op: str, slopes: Tensor, batch: int, heads: int, q: Tensor) -> Tensor:
    """ALiBi slopes as (B, H) or (H), in the dtype of the statistics."""
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: alibi_slopes must have shape (H) = ({heads},) or (B, H) = ({batch}, {heads}),"
            f" got {tuple(slopes.shape)}"
        )
    checks.floating(op, alibi_slopes=slopes)
    if slopes.requires_grad:
        raise ValueError(f"{op}: alibi_slopes get no gradient, but they require one; pass alibi_slopes.detach()")
    return slopes.to(checks.statistics_dtype(q)).contiguous()


def _check_packed(op: str, batch: int, length: int, columns: int, cu_seqlens: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: cu_seqlens must be int32 of shape (n + 1), n >= 1,"
            f" got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if batch != 1 or length != columns:
        raise ValueError(
            f"{op}: packed sequences have batch 1 and as many keys as queries,"
            f" got batch {batch}, {length} queries and {columns} keys"
        )


def _check_boundaries(cu_seqlens: Tensor, length: int, max_seqlen: int) -> None:
    """The values of cu_seqlens, where they can be read without waiting for a device."""
    values = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(values)]
    if values[0] != 0 or values[-1] != length or min(lengths) < 0:
        raise ValueError(f"attention: cu_seqlens must rise from 0 to T = {length}, got {values}")
    if max(lengths) > max_seqlen:
        raise ValueError(f"attention: max_seqlen is {max_seqlen}, but the longest sequence has {max(lengths)}")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, alibi_slopes, cu_seqlens, rng_state, *options):  # type: ignore[override]
        out, lse = _forward(q, k, v, alibi_slopes, cu_seqlens, rng_state, *options)
        ctx.save_for_backward(q, k, v, out, lse, alibi_slopes, cu_seqlens, rng_state)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dout, dlse):  # type: ignore[override]
        nothing = (None,) * (3 + len(ctx.options))
        if dout is None and dlse is None:
            return None, None, None, *nothing
        return *_backward(dout, dlse, *ctx.saved_tensors, *ctx.options), *nothing


_apply = library.apply_of(_Attention)


def _forward_impl(q, k, v, alibi_slopes, cu_seqlens, rng_state, *options):
    if cu_seqlens is not None and not cu_seqlens.is_cuda:
        _check_boundaries(cu_seqlens, q.shape[1], max_seqlen=options[-2])
    module = registry.implementation("attention", options[-1])
    return module.forward(q, k, v, alibi_slopes, cu_seqlens, rng_state, *options[:-1])


def _forward_fake(q, k, v, alibi_slopes, cu_seqlens, rng_state, *options):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=checks.statistics_dtype(q))


def _backward_impl(dout, dlse, q, k, v, *arguments):
    gradients = memory.empty_like(q), memory.empty_like(k), memory.empty_like(v)
    _backward_to(gradients, dout, dlse, q, k, v, *arguments)
    return gradients


def _backward_to(gradients, *arguments):
    """The backend's backward writes dq, dk and dv: contiguous ones, or slices of a packed gradient (qkvpacked.py)."""
    registry.implementation("attention", arguments[-1]).backward(*arguments[:-1], *gradients)


def _backward_fake(dout, dlse, q, k, v, *arguments):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_OPTIONS = (
    "Tensor? alibi_slopes, Tensor? cu_seqlens, Tensor? rng_state, float scale, int window_left,"
    " int window_right, float softcap, float dropout_p, SymInt max_seqlen, str backend"
)
# window_left, window_right: -1 for no bound; causal is window_right = 0.
# rng_state: (seed, offset) int64, there exactly where dropout_p > 0. -> out (B, T, H, D), lse (B, H, T)
_forward = library.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", _forward_impl, _forward_fake
)
# dout: None where only lse was used; dlse: None where only out was. -> dq, dk, dv, contiguous
_backward = library.define(
    f"attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


registry.register("attention", _prepare, reference=reference, cpu=native, cuda=native, triton=triton)
