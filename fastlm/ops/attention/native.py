"""Attention through fastlm._C: the C++ kernel on CPU tensors, the CUDA kernels on CUDA tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops import memory, native, philox
from fastlm.ops.native import DTYPE_CODE, pointer

MAX_CUDA_WIDTH = 256
MAX_CUDA_LENGTH = 2**29


def unsupported(q: Tensor, k: Tensor, *rest: object) -> str | None:
    if q.dtype not in DTYPE_CODE:
        return f"its kernels are for float32, bfloat16 and float16, got {q.dtype}"
    if native.on_cuda(q) and max(q.shape[1], k.shape[1]) > MAX_CUDA_LENGTH:
        return f"its CUDA kernels are for up to 2^29 queries and keys, got {q.shape[1]} and {k.shape[1]}"
    if native.on_cuda(q) and q.shape[3] > MAX_CUDA_WIDTH:
        return f"its CUDA kernels are for head dims up to {MAX_CUDA_WIDTH}, got {q.shape[3]}"
    return None


def forward(
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
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = q.shape
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    on_cuda, q, k, v = native.on_cuda(q), _rows(q), _rows(k), _rows(v)
    out = memory.empty_like(q)
    inputs = _inputs(
        q, k, v, alibi_slopes, cu_seqlens, rng_state, scale, window_left, window_right, softcap, dropout_p, max_seqlen
    )
    native.C.attention_forward(on_cuda, out.data_ptr(), lse.data_ptr(), *inputs, native.stream(q))
    return _narrowed(out, width), lse


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
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    on_cuda = native.on_cuda(q)
    q, k, v = _rows(q), _rows(k), _rows(v)
    if on_cuda and dout is None:
        dout = torch.zeros_like(out)
    dout = None if dout is None else _rows(dout)
    dlse = None if dlse is None else dlse.contiguous()
    padded = q.shape[3] != dq.shape[3]
    written = [memory.empty_like(t) for t in (q, k, v)] if padded else [dq, dk, dv]
    out = _rows(out)
    inputs = _inputs(
        q, k, v, alibi_slopes, cu_seqlens, rng_state, scale, window_left, window_right, softcap, dropout_p, max_seqlen
    )
    workspace = lse.new_empty(native.C.attention_backward_workspace(*inputs)) if on_cuda else None
    native.C.attention_backward(
        on_cuda,
        tuple(pointer(t) for t in (out, lse, dout, dlse, *written)),
        (*((0, 0, 0) if dout is None else dout.stride()[:3]), written[0].stride(1), written[1].stride(1)),
        *inputs,
        pointer(workspace),
        native.stream(q),
    )
    if padded:
        for gradient, wide in zip((dq, dk, dv), written, strict=True):
            gradient.copy_(wide[..., : gradient.shape[3]])


def _rows(t: Tensor) -> Tensor:
    """With a contiguous last dimension, and on CUDA in whole chunks of 16 bytes: what the kernels ask of strides."""
    if not native.on_cuda(t):
        return t if t.stride(3) == 1 else t.contiguous()
    if t.shape[3] % 8:
        return F.pad(t, (0, -t.shape[3] % 8))  # zeros change no score
    (b, n, h, _), (of_b, of_n, of_h, of_d), size = t.shape, t.stride(), t.element_size()
    steps = (of_b if b != 1 else 0) | (of_n if n != 1 else 0) | (of_h if h != 1 else 0)
    aligned = (t.data_ptr() | steps * size) % 16 == 0  # powers of two: all are multiples of 16 where their OR is
    return t if aligned and of_d == 1 else t.clone(memory_format=torch.contiguous_format)


def _narrowed(t: Tensor, width: int) -> Tensor:
    return t if t.shape[3] == width else t[..., :width].contiguous()


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
    max_seqlen: int,
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
            max_seqlen,
            native.has_wgmma(q),
        ),
        scale,
        softcap,
        philox.threshold(dropout_p),
        1 / (1 - dropout_p),
        DTYPE_CODE[q.dtype],
    )
