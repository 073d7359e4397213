"""AdamW by the CUDA kernel: one launch for all tensors of the call."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from torch import Tensor

from fastlm.ops import multi_tensor, native
from fastlm.ops.adamw.native import Rows
from fastlm.ops.adamw.native import unsupported as unsupported

_ROW_BYTES = 88  # of AdamWRow in csrc/optimizer/adamw.h


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
    grad_scale: float | Tensor,
    maximize: bool,
) -> None:
    rows = Rows(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters)
    table, chunks = array("q"), 0  # AdamWRow of csrc/optimizer/adamw.h
    for row in rows.rows:
        aligned = all(address % 16 == 0 for address in row[:6])
        table.extend((*row, chunks, aligned))
        chunks += multi_tensor.chunks_of(row[6])
    step_rows(
        table.tobytes(),
        chunks,
        params[0],
        step,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        grad_scale,
        maximize,
        rows.finish,
    )


def step_rows(
    table: bytes,
    chunks: int,
    first: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
    maximize: bool,
    finish: Callable[[], None] = lambda: None,
) -> None:
    """A step by a table that is made already; `first`: the first parameter. `finish` is called on its device."""
    scale = None
    if isinstance(grad_scale, Tensor):
        scale, grad_scale = grad_scale.float(), 1.0
    with native.on_its_device(first):
        on_device = multi_tensor.on_device(table, first.device)
        native.C.adamw_step_cuda(
            on_device.data_ptr(),
            len(table) // _ROW_BYTES,
            chunks,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            step,
            grad_scale,
            maximize,
            native.pointer(scale),
            native.stream(first),
        )
        finish()
