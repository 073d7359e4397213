"""The MLP block in Triton.

In half precision the first product has the bias and the activation in its epilogue, and the backward's product with the
second matrix has the activation's derivative, its recomputation and the bias's gradient in its own. Products without an
epilogue, and all products in float32, are left to PyTorch's library; then the elementwise part is a kernel of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops import memory
from fastlm.ops.checks import autocast_off
from fastlm.ops.gradients import weight_gradient
from fastlm.ops.linear.reference import backward as linear_backward
from fastlm.ops.mlp.reference import ACTIVATIONS, GATED
from fastlm.ops.triton_support import FLOATS, Config, Example, Kernel, architecture, cdiv, gemm
from fastlm.ops.triton_support.column_sum import column_sum


@functools.cache
def _elementwise(arch: str, problem: tuple) -> tuple[Config, ...]:
    # Tall enough that the column sums' workspace is a fiftieth of the tensor; wide enough for 16 bytes a thread.
    return tuple(Config(BM=bm, BN=bn, num_warps=4) for bm, bn in ((32, 128), (16, 256)))


@functools.cache
def _elementwise_backward(arch: str, problem: tuple[bool]) -> tuple[Config, ...]:
    if arch in ("sm_80", "sm_86") and problem[0]:  # float32: with 32 rows sm_80's registers spill
        return (Config(BM=16, BN=128, num_warps=4),)
    return _elementwise(arch, ())


MODULE = "fastlm.ops.mlp.triton_kernels"
LINEAR_ACT = Kernel(f"{MODULE}:linear_act", gemm.tiles)
LINEAR_ACT_BACKWARD = Kernel(f"{MODULE}:linear_act_backward", gemm.tiles)
ACT = Kernel(f"{MODULE}:act", _elementwise)
ACT_BACKWARD = Kernel(f"{MODULE}:act_backward", _elementwise_backward)


def unsupported(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    if x.dtype not in FLOATS:
        return f"its kernels are for float32, bfloat16 and float16, got {x.dtype}"
    if max(x.numel() // max(x.shape[-1], 1), *weight.shape) >= 2**31:
        return f"its kernels are for fewer than 2^31 rows and columns, got {tuple(x.shape)} and {tuple(weight.shape)}"
    return None


def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    rows, wide = x.reshape(-1, x.shape[-1]), weight.shape[0]
    gated = activation in GATED
    hidden = x.new_empty((*x.shape[:-1], wide // 2 if gated else wide))
    pre = x.new_empty((*x.shape[:-1], wide) if keep else 0)
    m, n = len(rows), hidden.shape[-1]
    if m == 0:
        return hidden, pre
    if x.dtype == torch.float32:
        with autocast_off(x):
            computed = F.linear(rows, weight, bias)
        config = ACT.config(x.device, ())
        ACT(config, (cdiv(m, config["BM"]), cdiv(n, config["BN"]), 1), computed, hidden, m, n, gated, activation)
        return hidden, computed.view(pre.shape) if keep else pre
    a, b, b_rows = _operands(rows, weight)
    k = a.shape[1]
    reading = gemm.reading(architecture(x.device), a, b)
    config = LINEAR_ACT.config(x.device, (gemm.height(m), 4 if gated else 2, reading))
    bm, bn, bk, described = config["BM"], config["BN"], config["BK"], config["TMA"]
    LINEAR_ACT(
        config,
        gemm.grid(config, m, n),
        gemm.describe(a, [bm, bk]) if described else a,
        gemm.describe(b, [bn, bk] if b_rows else [bk, bn]) if described else b,
        None if bias is None else bias.contiguous(),
        hidden,
        pre if keep else None,
        m,
        n,
        k,
        a.stride(0),
        b.stride(0),
        b_rows,
        gated,
        activation,
        k % bk == 0,
    )
    return hidden, pre


def mlp_forward(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    hidden, pre = linear_act_forward(x, fc_weight, fc_bias, activation, keep)
    with autocast_off(x):
        y = F.linear(hidden, proj_weight, proj_bias)
    return memory.reshaped(y, *y.shape), pre


def linear_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    dpre, dbias, _ = _act_backward(dy, pre, activation, needs[2], False, dtype)
    with autocast_off(x):
        dx, dweight, _ = linear_backward(dpre, x, weight, [*needs[:2], False], dtype)
    return dx, dweight, dbias


def mlp_backward(
    dy: Tensor,
    x: Tensor,
    fc_weight: Tensor,
    proj_weight: Tensor,
    pre: Tensor,
    activation: str,
    needs: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with autocast_off(x):
        rows = dy.reshape(-1, dy.shape[-1])
        if x.dtype == torch.float32 or len(rows) == 0:
            dhidden = (rows @ proj_weight).view(*pre.shape[:-1], proj_weight.shape[1])
            dpre, dbias, hidden = _act_backward(dhidden, pre, activation, needs[2], needs[3], dtype)
        else:
            dpre, dbias, hidden = _fused_backward(rows, proj_weight, pre, activation, needs[2], needs[3], dtype)
        dproj_weight = weight_gradient(rows, hidden, dtype) if needs[3] else dy.new_empty(0, dtype=dtype)
        dproj_bias = rows.sum(0, dtype=dtype) if needs[4] else dy.new_empty(0, dtype=dtype)
        dx, dfc_weight, _ = linear_backward(dpre, x, fc_weight, [*needs[:2], False], dtype)
        return dx, dfc_weight, dbias, dproj_weight, dproj_bias


def _act_backward(
    dhidden: Tensor, pre: Tensor, activation: str, needs_dbias: bool, needs_hidden: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre, dbias in `dtype` and the activation once more (rows, F), from the activation's gradient."""
    wide, gated = pre.shape[-1], activation in GATED
    rows = dhidden.reshape(-1, dhidden.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    m, n = rows.shape
    dpre = torch.empty_like(pre)
    hidden = pre.new_empty((m, n) if needs_hidden else 0)
    if m == 0:
        return dpre, pre.new_zeros(wide if needs_dbias else 0, dtype=dtype), hidden
    config = ACT_BACKWARD.config(pre.device, (pre.dtype == torch.float32,))
    parts = cdiv(m, config["BM"])
    partial = pre.new_empty((1, parts, wide), dtype=torch.float32) if needs_dbias else None
    ACT_BACKWARD(
        config,
        (parts, cdiv(n, config["BN"]), 1),
        rows,
        pre,
        dpre,
        hidden if needs_hidden else None,
        partial,
        m,
        n,
        rows.stride(0),
        gated,
        activation,
    )
    return dpre, _dbias(partial, pre, dtype), hidden


def _fused_backward(
    dy: Tensor,
    proj_weight: Tensor,
    pre: Tensor,
    activation: str,
    needs_dbias: bool,
    needs_hidden: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the gradient behind the second matrix, (rows, C_out)."""
    wide, gated = pre.shape[-1], activation in GATED
    a, b, b_rows = _operands(dy, proj_weight.T)
    (m, k), n = a.shape, proj_weight.shape[1]
    dpre = torch.empty_like(pre)
    hidden = pre.new_empty((m, n) if needs_hidden else 0)
    reading = gemm.reading(architecture(pre.device), a, b)
    # The epilogue holds the gradient, one or two pre-activations and what is made of them; erf takes most registers.
    config = LINEAR_ACT_BACKWARD.config(pre.device, (gemm.height(m), 8 if activation == "geglu" else 4, reading))
    bm, bn, bk, described = config["BM"], config["BN"], config["BK"], config["TMA"]
    partial = pre.new_empty((1, cdiv(m, bm), wide), dtype=torch.float32) if needs_dbias else None
    LINEAR_ACT_BACKWARD(
        config,
        gemm.grid(config, m, n),
        gemm.describe(a, [bm, bk]) if described else a,
        gemm.describe(b, [bn, bk] if b_rows else [bk, bn]) if described else b,
        pre,
        dpre,
        hidden if needs_hidden else None,
        partial,
        m,
        n,
        k,
        a.stride(0),
        b.stride(0),
        b_rows,
        gated,
        activation,
        k % bk == 0,
    )
    return dpre, _dbias(partial, pre, dtype), hidden


def _operands(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(M, K) with contiguous rows, and (N, K) or, where the third result is false, its transpose (K, N)."""
    a, rows_are_rows = gemm.row_major(rows)
    if not rows_are_rows:
        a = rows.contiguous()
    return a, *gemm.row_major(weight)


def _dbias(partial: Tensor | None, pre: Tensor, dtype: torch.dtype) -> Tensor:
    if partial is None:
        return pre.new_empty(0, dtype=dtype)
    dbias = pre.new_empty(pre.shape[-1], dtype=dtype)
    column_sum(partial, dbias)
    return dbias


def examples(device: torch.device) -> Iterator[Example]:
    """Every activation at GPT-2's size; one gated and one not in what else makes other code: few rows, a transposed
    weight, no bias and nothing kept at a width that no block divides, float32."""
    half = torch.bfloat16
    for activation in ACTIVATIONS:
        yield _example(device, 4096, half, activation)
    for activation in ("gelu_tanh", "swiglu"):
        yield _example(device, 256, half, activation)
        yield _example(device, 8, half, activation)
        yield _example(device, 4096, half, activation, transposed=True)
        yield _example(device, 4096, torch.float16, activation, width=767, plain=True)
        yield _example(device, 4096, torch.float32, activation)


def _example(
    device: torch.device,
    rows: int,
    dtype: torch.dtype,
    activation: str,
    width: int = 768,
    transposed: bool = False,
    plain: bool = False,
) -> Example:
    wide = 8 * width if activation in GATED else 4 * width

    def make(*shape: int) -> Tensor:
        if transposed and len(shape) == 2 and shape[0] != rows:
            return torch.ones(shape[::-1], dtype=dtype, device=device).T
        return torch.ones(shape, dtype=dtype, device=device)

    def call() -> None:
        x, fc, proj, bias = make(rows, width), make(wide, width), make(width, 4 * width), None if plain else make(wide)
        y, pre = mlp_forward(x, fc, bias, proj, None, activation, not plain)
        pre = make(rows, wide) if plain else pre
        mlp_backward(y, x, fc, proj, pre, activation, [True, True, not plain, True, True], dtype)
        linear_act_backward(make(rows, 4 * width), x, fc, pre, activation, [True, True, not plain], dtype)

    traits = f"{' transposed' if transposed else ''}{' plain' if plain else ''}"
    return Example(f"{rows} rows {width} {activation} {dtype}{traits}".replace("torch.", ""), call)
