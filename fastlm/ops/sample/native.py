"""Sampling through fastlm._C: the C++ kernel on CPU tensors, the CUDA kernel on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import native
from fastlm.ops.native import DTYPE_CODE, pointer


def unsupported(logits: Tensor, *rest: object) -> str | None:
    if logits.dtype not in DTYPE_CODE:
        return f"its kernels are for float32, bfloat16 and float16, got {logits.dtype}"
    return None


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, log_min_p: float, rng_state: Tensor | None
) -> Tensor:
    rows, vocabulary = logits.shape
    ids = logits.new_empty(rows, dtype=torch.int64)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rng_state = None if rng_state is None else rng_state.contiguous()
    native.C.sample(
        logits.is_cuda,
        logits.data_ptr(),
        ids.data_ptr(),
        pointer(rng_state),
        rows,
        vocabulary,
        logits.stride(0),
        rng_state is not None and rng_state.dim() == 2,
        temperature,
        top_k,
        top_p,
        log_min_p,
        DTYPE_CODE[logits.dtype],
        native.stream(logits),
    )
    return ids
