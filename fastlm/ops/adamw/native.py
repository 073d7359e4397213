"""AdamW through fastlm._C: the C++ kernel on CPU tensors."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import checks, library, multi_tensor, native, registry
from fastlm.ops.native import DTYPE_CODE, pointer


def unsupported(params: Sequence[Tensor], grads: Sequence[Tensor], *rest: Any) -> str | None:
    for t in (*params, *grads):
        if t.dtype not in DTYPE_CODE:
            return f"its kernel is for float32, bfloat16 and float16, got {t.dtype}"
        if type(t) not in checks.PLAIN:
            return f"a parameter or gradient is a {type(t).__name__}"
    return None


class Rows:
    """What a kernel gets of each parameter, in packed memory: nine numbers in the order of csrc/optimizer/adamw.h."""

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor | None],
        masters: Sequence[Tensor | None],
    ) -> None:
        self.rows: list[tuple[int, ...]] = []
        self._kept: list[Tensor] = []  # their memory must outlive the call
        self._copies: list[tuple[Tensor, Tensor]] = []
        for p, grad, m, v, v_max, master in zip(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, strict=True
        ):
            if not grad.is_contiguous():
                grad = grad.contiguous()
                self._kept.append(grad)
            updated, shadow = (p, None) if master is None else (master, p)
            # The kernel reads and writes packed memory, and its shadow copy is in bfloat16. Else: a second pass.
            if not updated.is_contiguous():
                updated = updated.contiguous()
                self._copies.append((p, updated))
            elif shadow is not None and (shadow.dtype != torch.bfloat16 or not shadow.is_contiguous()):
                shadow = None
                self._copies.append((p, updated))
            self.rows.append(
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

    def finish(self) -> None:
        """Write to the parameters what the kernel could not write itself."""
        for p, updated in self._copies:
            p.copy_(updated)


def table_of(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor]
) -> tuple[bytes, int] | None:
    """The kernel's table, and on a GPU its chunks, made in C++. None: somebody looks at the calls, another backend is
    forced, or a tensor is not packed or breaks the contract."""
    on_cuda = params[0].is_cuda
    if library.watched() or not registry.may_run(params[0].device.type) or not native.reads_tensors():
        return None
    if on_cuda and native.cuda_unavailable() is not None:
        return None
    lists = (list(params), list(grads), list(exp_avgs), list(exp_avg_sqs))
    return native.C.adamw_table_torch(*lists, multi_tensor.CHUNK if on_cuda else 0)


def common_step(steps: list[Tensor], add_one: bool = False) -> int | None:
    """What all these CPU scalars hold, to each of which 1 is added then; None where they differ, or without the C++."""
    return native.C.adamw_steps_torch(steps, add_one) if native.reads_tensors() else None


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
) -> None:
    """A step by a table of `table_of`."""
    rows = memoryview(table).cast("q")
    native.C.adamw_step(rows, lr, beta1, beta2, eps, weight_decay, step, float(grad_scale), maximize)


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
    table = array("q", itertools.chain.from_iterable(rows.rows))
    native.C.adamw_step(table, lr, beta1, beta2, eps, weight_decay, step, float(grad_scale), maximize)
    rows.finish()
