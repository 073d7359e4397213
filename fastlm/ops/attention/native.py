"""Attention through fastlm._C: the C++ kernel on CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import native, philox
from fastlm.ops.native import DTYPE_CODE, pointer


def unsupported(q: Tensor, *rest: object) -> str | None:
    if q.dtype not in DTYPE_CODE:
        return f"its kernels are for float32, bfloat16 and float16, got {q.dtype}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    rng_state: Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    q, k, v = _rows(q), _rows(k), _rows(v)
    inputs = _inputs(q, k, v, alibi_slopes, cu_seqlens, rng_state, scale, window_left, window_right, softcap, dropout_p)
    native.C.attention_forward(out.data_ptr(), lse.data_ptr(), *inputs)
    return out, lse


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    rng_state: Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    q, k, v = _rows(q), _rows(k), _rows(v)
    dout = None if dout is None else _rows(dout)
    dlse = None if dlse is None else dlse.contiguous()
    inputs = _inputs(q, k, v, alibi_slopes, cu_seqlens, rng_state, scale, window_left, window_right, softcap, dropout_p)
    native.C.attention_backward(
        tuple(pointer(t) for t in (out, lse, dout, dlse, dq, dk, dv)),
        (0, 0, 0) if dout is None else dout.stride()[:3],
        *inputs,
    )
    return dq, dk, dv


def _rows(t: Tensor) -> Tensor:
    """With a contiguous last dimension: what the kernels ask of strides."""
    return t if t.stride(3) == 1 else t.contiguous()


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    rng_state: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
) -> tuple:
    """AttentionInputs of csrc/attention/attention.h, in the order that csrc/bindings.cpp takes it."""
    batch, length, heads, width = q.shape
    columns, kv_heads = k.shape[1], k.shape[2]
    return (
        (q.data_ptr(), k.data_ptr(), v.data_ptr(), pointer(alibi_slopes), pointer(cu_seqlens), pointer(rng_state)),
        (
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
            cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 0,
            batch,
            length,
            columns,
            heads,
            kv_heads,
            width,
            window_left,
            window_right,
        ),
        scale,
        softcap,
        philox.threshold(dropout_p),
        1 / (1 - dropout_p),
        DTYPE_CODE[q.dtype],
    )
