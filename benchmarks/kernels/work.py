"""Representative work for the CUDA kernels: which kernel does it, and the bytes and operations that it cannot avoid."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Recorded = list[dict[str, Any]]  # the emulator's line of each launch, in order


@dataclass(frozen=True)
class Work:
    """One kernel's part of an op, for one shape.

    Args:
        kernel: its name as `objects.short_name` gives it.
        shape: in words.
        bytes: each input read once, each output written once.
        flops: of its matrix products, those that it computes again included.
        op: whose launch on the emulator says how much dynamic shared memory it gets, and its bank conflicts.
        launch: which of the op's launches it is.
        tf32: three products in tf32 for one in float32; `flops` counts all three.
    """

    kernel: str
    shape: str
    bytes: float
    flops: float = 0.0
    op: str = ""
    launch: int = 0
    tf32: bool = False


def attention(arch: str) -> list[Work]:
    b, h, t, d = 2, 16, 8192, 128
    shape, tensor, product = f"{b} x {t} x {h} x {d}, causal", 2.0 * b * h * t * d, 2.0 * b * h * t * t * d / 2
    rows = 4.0 * b * h * t  # one float32 a row
    # dq's sums in float32 and back, for each of 64 blocks of keys, are the L2's matter.
    forward, backward, dq = (4 * tensor + rows, 2 * product), (8 * tensor + 2 * rows, 5 * product), 3 * tensor
    delta = Work("attention_delta<bf16>", shape, 2 * tensor + 3 * rows)
    if arch == "sm_90a":
        return [
            Work("attention_forward_wgmma<bf16, 128>", shape, *forward, "attention wgmma", 0),
            delta,
            Work("attention_backward_sm90<bf16, 128>", shape, *backward, "attention wgmma", 2),
            Work("attention_dq_sm90<bf16, 128>", shape, dq, 0, "attention wgmma", 3),
        ]
    return [
        Work("attention_forward<bf16, 128, false>", shape, *forward, "attention", 0),
        delta,
        Work("attention_backward<bf16, 128, false, true>", shape, *backward, "attention", 2),
        Work("attention_dq<bf16, 128, true>", shape, dq, 0, "attention", 3),
    ]


def fused_product() -> Work:
    """A product with bias and GELU, which writes the pre-activation too, on Hopper."""
    m, n, k = 16384, 3072, 768
    moved = 2.0 * (m * k + n * k + 2 * m * n)
    shape = f"{m} x {k} by {k} x {n}, bias, GELU"
    kernel = "gemm_kernel_sm90<bf16, 192, false, false, (EpilogueKind)1, false>"
    return Work(kernel, shape, moved, 2.0 * m * n * k, "wgmma")


def matrix_products(arch: str) -> list[Work]:
    m, n, k = 16384, 3072, 768
    shape, elements, flops = f"{m} x {k} by {k} x {n}", m * k + n * k + m * n, 2.0 * m * n * k
    kernel = "gemm_kernel_sm90<bf16, 192, false, false, (EpilogueKind)0, false>"
    hopper = Work(kernel, shape, 2.0 * elements, flops, "wgmma")
    return [
        Work("gemm_kernel<bf16, 128, false, false, true>", shape, 2.0 * elements, flops, "linear bf16"),
        Work("gemm_kernel<f32, 64, false, false, true>", shape, 4.0 * elements, 3 * flops, "linear f32", tf32=True),
        *([hopper, fused_product()] if arch == "sm_90a" else []),
    ]


def by_memory(arch: str) -> list[Work]:
    rows, width, vocab, parameters = 16384, 768, 50304, 124_000_000
    row, norm = f"{rows} x {width}", 2.0 * rows * width
    logits = 2.0 * 4096 * vocab  # two rows fit into a Hopper's shared memory, not into an Ampere's
    loss = "cross_entropy_row<bf16, false>" if arch == "sm_90a" else "cross_entropy_block<bf16>"
    return [
        Work("forward_in_registers<bf16, *", row, 2 * norm, op="layer_norm"),
        Work("backward_in_registers<bf16, *", row, 3 * norm, op="layer_norm", launch=1),
        Work("turn<bf16, 8>", f"{rows} x 12 x 64", 2 * norm),
        Work("gather<bf16>", row, 2 * norm),
        Work(loss, f"4096 x {vocab}, logits to gradients", 2 * logits),
        Work("step_chunks", f"{parameters:,} float32 parameters", 28.0 * parameters),
        Work("decode_parts_kernel<bf16, 1>", "16 x 12 heads of 64, 1024 keys", 2.0 * 2 * 16 * 12 * 1024 * 64),
    ]


def all_work(arch: str) -> list[Work]:
    """What the kernels of an architecture are measured by."""
    older = attention("sm_80")  # Hopper runs them too, where its own do not take the call
    return [*dict.fromkeys((*attention(arch), *older)), *matrix_products(arch), *by_memory(arch)]


def recorded() -> dict[str, Recorded]:
    """Small shapes through the emulator, for what a launch gets and for its bank conflicts, by `Work.op`.

    Raises tests.emulator.build.Unavailable where the emulator cannot be built.
    """
    import torch

    import fastlm
    from fastlm import ops
    from tests.emulator import backend

    backend.module()
    backend.register()
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    def attention() -> None:
        q, k, v = (leaf(1, 128, 1, 128) for _ in range(3))
        ops.attention(q, k, v, causal=True).sum().backward()

    def layer_norm() -> None:
        ops.layer_norm(leaf(64, 768), leaf(768), leaf(768)).sum().backward()

    def linear(dtype: torch.dtype) -> None:  # tiles of 128 columns fill it, and tiles of 192
        with torch.no_grad():
            ops.linear_act(
                leaf(256, 256, dtype=dtype), leaf(384, 256, dtype=dtype), leaf(384, dtype=dtype), activation="gelu"
            )

    def on_hopper(call: Callable[[], None]) -> Recorded:
        backend.HOPPER = True
        try:
            return launches_of(call)
        finally:
            backend.HOPPER = False

    with fastlm.backend("emulator"):
        return {
            "attention": launches_of(attention),
            "attention wgmma": on_hopper(attention),
            "layer_norm": launches_of(layer_norm),
            "linear bf16": launches_of(lambda: linear(torch.bfloat16)),
            "linear f32": launches_of(lambda: linear(torch.float32)),
            "wgmma": on_hopper(lambda: linear(torch.bfloat16)),
        }


def launches_of(call: Callable[[], None]) -> Recorded:
    """The emulator's line of every launch inside the call."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "counts")
        os.environ["FASTLM_EMULATOR_COUNTS"] = str(path)
        try:
            call()
        finally:
            del os.environ["FASTLM_EMULATOR_COUNTS"]
        return [json.loads(line) for line in path.read_text().splitlines()]
