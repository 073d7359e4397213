"""AdamW through fastlm._C: the C++ kernel on CPU tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import native
from fastlm.ops.native import DTYPE_CODE, pointer


def unsupported(params: Sequence[Tensor], grads: Sequence[Tensor], *rest: Any) -> str | None:
    for t in (*params, *grads):
        if t.dtype not in DTYPE_CODE:
            return f"its kernel is for float32, bfloat16 and float16, got {t.dtype}"
    return None


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None],
    masters: Sequence[Tensor | None],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
    maximize: bool,
) -> None:
    table, kept, copies = array("q"), [], []
    for p, grad, m, v, v_max, master in zip(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, strict=True
    ):
        if not grad.is_contiguous():
            grad = grad.contiguous()
            kept.append(grad)  # its memory must outlive the call
        updated, shadow = (p, None) if master is None else (master, p)
        # The kernel reads and writes packed memory, and its shadow copy is in bfloat16. Else: a second pass.
        if not updated.is_contiguous():
            updated = updated.contiguous()
            copies.append((p, updated))
        elif shadow is not None and (shadow.dtype != torch.bfloat16 or not shadow.is_contiguous()):
            shadow = None
            copies.append((p, updated))
        table.extend(
            (
                updated.data_ptr(),
                grad.data_ptr(),
                m.data_ptr(),
                v.data_ptr(),
                pointer(v_max),
                pointer(shadow),
                m.numel(),
                DTYPE_CODE[updated.dtype],
                DTYPE_CODE[grad.dtype],
            )
        )
    native.C.adamw_step(table, lr, beta1, beta2, eps, weight_decay, step, grad_scale, maximize)
    for p, updated in copies:
        p.copy_(updated)
