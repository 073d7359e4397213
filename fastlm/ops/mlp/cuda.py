"""The MLP block on the GPU: products with the activation, its derivative and the bias gradient fused in (csrc/gemm).

Beside outputs and gradients the activation is held, (..., F), and in the backward pass its gradient: the forward pass
reads and writes the pre-activation once, the backward pass reads it once. Where the library makes float32 products
(gemm.library_makes_float32), the activation is a pass of its own, short beside them, and its gradient a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import gemm, native
from fastlm.ops.gradients import bias_gradient
from fastlm.ops.mlp import reference
from fastlm.ops.mlp.native import CODE, unsupported
from fastlm.ops.mlp.reference import GATED
from fastlm.ops.native import DTYPE_CODE, pointer

__all__ = ["linear_act_backward", "linear_act_forward", "mlp_backward", "mlp_forward", "unsupported"]

# In decoding, the library's products, of which some are made for so few rows: on an H200, for one row of 768 by 3072,
# half of the time of ours, the activation included.
_FEW_ROWS = 64


def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    rows, wide = x.reshape(-1, x.shape[-1]), weight.shape[0]  # (N, C)
    few = x.is_cuda and rows.shape[0] <= _FEW_ROWS and not keep and x.dtype != torch.float32
    if few or gemm.library_makes_float32(x):
        return reference.linear_act_forward(x, weight, bias, activation, keep)
    hidden = x.new_empty((*x.shape[:-1], wide // 2 if activation in GATED else wide))
    pre = x.new_empty((*x.shape[:-1], wide) if keep else 0)
    flat = hidden.view(rows.shape[0], hidden.shape[-1])
    gemm.activate(rows, weight, bias, CODE[activation], flat, pre if keep else None)
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
    y = x.new_empty((*x.shape[:-1], proj_weight.shape[0]))
    flat = hidden.view(-1, hidden.shape[-1])  # (N, F)
    gemm.product(flat, proj_weight, y.view(flat.shape[0], proj_weight.shape[0]), bias=proj_bias)
    return y, pre


def linear_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    wide = weight.shape[0]
    dys = dy.reshape(-1, dy.shape[-1]).contiguous()  # (N, F)
    dpre = pre.new_empty(dys.shape[0], wide)
    dbias = weight.new_empty(wide if needs[2] else 0, dtype=dtype)
    _activate_backward(dys, pre, activation, dpre, None, dbias)
    return (*_linear_gradients(dpre, x, weight, needs, dtype), dbias)


def _activate_backward(
    dhidden: Tensor, pre: Tensor, activation: str, dpre: Tensor, hidden: Tensor | None, dbias: Tensor
) -> None:
    """dpre from pre and the activation's gradient; the activation goes into `hidden`, dpre's sum into `dbias`: where
    the one is not None, the other not empty."""
    size = native.C.activation_backward_workspace_cuda(*dpre.shape) if dbias.numel() else 0
    workspace = pre.new_empty(size, dtype=torch.float32)
    native.C.activation_backward_cuda(
        pre.data_ptr(),
        dhidden.data_ptr(),
        dpre.data_ptr(),
        pointer(hidden),
        dbias.data_ptr(),
        workspace.data_ptr(),
        *dhidden.shape,
        CODE[activation],
        DTYPE_CODE[pre.dtype],
        DTYPE_CODE[dbias.dtype],
        native.stream(pre),
    )


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
    dys = dy.reshape(-1, dy.shape[-1])  # (N, C_out)
    dpre = pre.new_empty(dys.shape[0], fc_weight.shape[0])
    hidden = pre.new_empty(dys.shape[0], proj_weight.shape[1]) if needs[3] else None
    dfc_bias = fc_weight.new_empty(fc_weight.shape[0] if needs[2] else 0, dtype=dtype)
    if gemm.library_makes_float32(dy):
        dhidden = gemm.product(dys, proj_weight.T, dys.new_empty(dys.shape[0], proj_weight.shape[1]))
        _activate_backward(dhidden, pre, activation, dpre, hidden, dfc_bias)
        del dhidden
    else:
        gemm.activate_backward(dys, proj_weight.T, pre, CODE[activation], dpre, hidden, dfc_bias if needs[2] else None)
    dproj_weight = dy.new_empty(proj_weight.shape if needs[3] else 0, dtype=dtype)
    if hidden is not None:
        gemm.product(dys.T, hidden.T, dproj_weight)
        del hidden
    dproj_bias = bias_gradient(dys, dtype) if needs[4] else dy.new_empty(0, dtype=dtype)
    return (*_linear_gradients(dpre, x, fc_weight, needs, dtype), dfc_bias, dproj_weight, dproj_bias)


def _linear_gradients(
    dpre: Tensor, x: Tensor, weight: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dx, and in `dtype` dweight, of pre = x @ weight.T + bias; empty where nobody asks."""
    rows = x.reshape(-1, x.shape[-1])
    dx = x.new_empty(x.shape if needs[0] else 0)
    if needs[0]:
        gemm.product(dpre, weight.T, dx.view(rows.shape))
    dweight = weight.new_empty(weight.shape if needs[1] else 0, dtype=dtype)
    if needs[1]:
        gemm.product(dpre.T, rows.T, dweight)
    return dx, dweight
