"""AdamW in Triton: a launch for each parameter."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlm.ops import native
from fastlm.ops.adamw.native import unsupported as unsupported
from fastlm.ops.triton_support import Config, Example, Kernel, cdiv


@functools.cache
def _candidates(arch: str, problem: tuple) -> tuple[Config, ...]:
    # Four float32 (16 bytes) a thread and stream, twice: five streams are under way at once.
    return Config(BLOCK=1024, num_warps=4), Config(BLOCK=2048, num_warps=8)


STEP = Kernel("fastlm.ops.adamw.triton_kernels:step", _candidates)


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
    scale = None
    if isinstance(grad_scale, Tensor):  # it stays on the device: nothing waits for it
        scale, grad_scale = grad_scale.float(), 1.0
    numbers = (
        -grad_scale if maximize else grad_scale,
        1 - lr * weight_decay,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        1 - beta2**step,
        eps,
    )
    config = STEP.config(params[0].device, ())
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, strict=True)
    with native.on_its_device(params[0]):
        for p, grad, m, v, v_max, master in tensors:
            updated, shadow = (p, None) if master is None else (master, p)
            # The kernel reads and writes packed memory. What is not: a second pass.
            packed = p.is_contiguous()
            if not packed:
                updated, shadow = updated.contiguous(), None
            grid = (cdiv(m.numel(), config["BLOCK"]), 1, 1)
            STEP(config, grid, updated, grad.contiguous(), m, v, v_max, shadow, scale, m.numel(), *numbers)
            if not packed:
                p.copy_(updated)


def examples(device: torch.device) -> Iterator[Example]:
    """Parameters in float32, in bfloat16, with a float32 master, with AMSGrad."""
    for dtype, master, amsgrad in (
        (torch.float32, False, False),
        (torch.float32, False, True),
        (torch.bfloat16, False, False),
        (torch.bfloat16, True, False),
        (torch.float16, True, True),
    ):
        yield _example(device, dtype, master, amsgrad)


def _example(device: torch.device, dtype: torch.dtype, master: bool, amsgrad: bool) -> Example:
    def call() -> None:
        p = torch.ones(3072, 768, dtype=dtype, device=device)
        wide = torch.ones(3072, 768, device=device)
        states = [wide], [wide.clone()], [wide.clone() if amsgrad else None], [wide.clone() if master else None]
        scale = torch.ones((), device=device) if amsgrad else 1.0
        step([p], [p.clone()], *states, 1, 1e-3, 0.9, 0.999, 1e-8, 0.1, scale, False)

    name = f"3072x768 {dtype}{' master' if master else ''}{' AMSGrad' if amsgrad else ''}"
    return Example(name.replace("torch.", ""), call)
