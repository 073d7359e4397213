"""The MLP block on the CPU: matrix products (products.py), and between them one pass of the C++ kernel.

The rows go through in blocks, so that what is needed for a moment only (the activation, its gradient) is a workspace of
bounded size, used again and again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import memory, native, products
from fastlm.ops.checks import autocast_off
from fastlm.ops.gradients import bias_gradient
from fastlm.ops.mlp.reference import ACTIVATIONS, GATED
from fastlm.ops.native import DTYPE_CODE, pointer

CODE = {name: i for i, name in enumerate(ACTIVATIONS)}  # csrc/mlp/mlp.h

# Bytes of a block of the pre-activation: 2,730 rows of GPT-2's MLP. Smaller blocks would not pay: each one's matrix
# products read all the weights.
BLOCK_BYTES = 32 << 20

# Below this the pre-activation needs no workspace: memory this small is not given back to the system. What counts there
# (a generated token) is the number of Python calls.
SMALL_BYTES = 64 << 10


def unsupported(x: Tensor, *rest: object) -> str | None:
    if x.dtype not in DTYPE_CODE:
        return f"its kernels are for float32, bfloat16 and float16, got {x.dtype}"
    return None


def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    rows, wide = x.reshape(-1, x.shape[-1]), weight.shape[0]
    if len(rows) * wide * x.element_size() <= SMALL_BYTES:
        with autocast_off(x):
            hidden, pre = _small_forward(rows, weight, bias, activation, keep)
        hidden = memory.reshaped(hidden, *x.shape[:-1], hidden.shape[1])
        return hidden, pre.view(*x.shape[:-1], wide) if keep else x.new_empty(0)
    hidden = memory.empty((*x.shape[:-1], _hidden_width(wide, activation)), x.dtype)
    flat = hidden.view(len(rows), hidden.shape[-1])
    pre = memory.empty((*x.shape[:-1], wide) if keep else (0,), x.dtype)
    blocks = _blocks(len(rows), wide * x.element_size())
    pres = pre.view(len(rows), wide) if keep else _scratch(blocks, wide, x.dtype)
    with autocast_off(x):
        for block in blocks:
            _activate(_part(rows, block), weight, bias, _part(pres, block), _part(flat, block), activation)
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
    rows, wide = x.reshape(-1, x.shape[-1]), fc_weight.shape[0]
    if len(rows) * wide * x.element_size() <= SMALL_BYTES:
        with autocast_off(x):
            hidden, pre = _small_forward(rows, fc_weight, fc_bias, activation, keep)
            y = memory.reshaped(products.linear(hidden, proj_weight, proj_bias), *x.shape[:-1], len(proj_weight))
        return y, pre.view(*x.shape[:-1], wide) if keep else x.new_empty(0)
    y = memory.empty((*x.shape[:-1], proj_weight.shape[0]), x.dtype)
    flat = y.view(len(rows), y.shape[-1])
    pre = memory.empty((*x.shape[:-1], wide) if keep else (0,), x.dtype)
    blocks = _blocks(len(rows), wide * x.element_size())
    pres = pre.view(len(rows), wide) if keep else _scratch(blocks, wide, x.dtype)
    hiddens = _scratch(blocks, proj_weight.shape[1], x.dtype)
    with autocast_off(x):
        for block in blocks:
            hidden, out = _part(hiddens, block), _part(flat, block)
            _activate(_part(rows, block), fc_weight, fc_bias, _part(pres, block), hidden, activation)
            products.mm(hidden, proj_weight.t(), out, proj_bias)
    return y, pre


def linear_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    dys, pres = dy.reshape(-1, dy.shape[-1]), pre.view(-1, weight.shape[0])
    blocks = _blocks(len(pres), pres.shape[1] * pre.element_size())
    gradients = _LinearGradients(x, weight, needs, len(blocks), dtype)
    dpres = _scratch(blocks, pres.shape[1], pre.dtype)
    with autocast_off(x):
        for block in blocks:
            dpre, dy_part = _part(dpres, block), _part(dys, block).contiguous()
            dbias = _activate_backward(_part(pres, block), dy_part, dpre, None, activation, needs[2], dtype)
            gradients.add(block, dpre, dbias)
    return gradients.dx, gradients.dweight.result(), gradients.dbias()


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
    dys, pres = dy.reshape(-1, dy.shape[-1]), pre.view(-1, fc_weight.shape[0])
    blocks = _blocks(len(pres), pres.shape[1] * pre.element_size())
    fc = _LinearGradients(x, fc_weight, needs[:3], len(blocks), dtype)
    dproj_weight = _Sum(proj_weight, needs[3], len(blocks), dtype)
    narrow = proj_weight.shape[1]
    dhiddens, hiddens = _scratch(blocks, narrow, pre.dtype), _scratch(blocks, narrow, pre.dtype)
    dpres = _scratch(blocks, pres.shape[1], pre.dtype) if activation in GATED else dhiddens
    with autocast_off(x):
        for block in blocks:
            dhidden, hidden, dpre = _part(dhiddens, block), _part(hiddens, block), _part(dpres, block)
            dy_part, pre_part = _part(dys, block), _part(pres, block)
            products.mm(dy_part, proj_weight, dhidden)
            kept = hidden if needs[3] else None
            dbias = _activate_backward(pre_part, dhidden, dpre, kept, activation, needs[2], dtype)
            dproj_weight.add(dy_part, hidden)
            fc.add(block, dpre, dbias)
    dproj_bias = bias_gradient(dys, dtype) if needs[4] else dy.new_empty(0, dtype=dtype)
    return fc.dx, fc.dweight.result(), fc.dbias(), dproj_weight.result(), dproj_bias


def _blocks(rows: int, row_bytes: int) -> list[slice]:
    """About equal blocks of rows, of at most BLOCK_BYTES."""
    most = max(16, BLOCK_BYTES // max(row_bytes, 1))
    step = -(-rows // -(-rows // most)) if rows else 1
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _hidden_width(pre_width: int, activation: str) -> int:
    return pre_width // 2 if activation in GATED else pre_width


def _scratch(blocks: list[slice], width: int, dtype: torch.dtype) -> Tensor:
    """Memory for the rows of one block, which all blocks use in turn."""
    return memory.empty((max((b.stop - b.start for b in blocks), default=0), width), dtype)


def _part(t: Tensor, block: slice) -> Tensor:
    """The block's rows of t; of scratch, which is as long as one block, the first ones."""
    length, wanted = t.shape[0], block.stop - block.start
    if length == wanted:  # mostly all of it: views cost time in a small model
        return t
    return t[block] if length >= block.stop else t[:wanted]


def _small_forward(
    rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """(hidden, pre), two-dimensional. Where pre is not kept, hidden may lie in it."""
    pre = rows.new_empty(len(rows), len(weight))
    in_place = not keep and activation not in GATED
    hidden = pre if in_place else rows.new_empty(len(rows), _hidden_width(len(weight), activation))
    _activate(rows, weight, bias, pre, hidden, activation)
    return hidden, pre


def _activate(rows: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, hidden: Tensor, activation: str) -> None:
    """pre = rows @ weight.T + bias, hidden = act(pre). Autocast must be off."""
    if bias is None or rows.dtype == torch.float32:
        products.mm(rows, weight.t(), pre)
        bias = None if bias is None else bias.contiguous()  # the kernel adds it on its way
    else:  # in half precision before the product is rounded
        products.mm(rows, weight.t(), pre, bias)
        bias = None
    native.C.activation_forward(
        pre.data_ptr(), pointer(bias), hidden.data_ptr(), *hidden.shape, CODE[activation], DTYPE_CODE[pre.dtype]
    )


def _activate_backward(
    pre: Tensor,
    dhidden: Tensor,
    dpre: Tensor,
    hidden: Tensor | None,
    activation: str,
    needs_dbias: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """dpre from dhidden, and into `hidden` the activation once more; the result is dbias in `dtype`."""
    rows, width = pre.shape
    dbias = workspace = None
    if needs_dbias:
        dbias = pre.new_empty(width, dtype=dtype)
        workspace = pre.new_empty(native.C.activation_backward_workspace(rows, width), dtype=torch.float32)
    native.C.activation_backward(
        pre.data_ptr(),
        dhidden.data_ptr(),
        dpre.data_ptr(),
        pointer(hidden),
        pointer(dbias),
        pointer(workspace),
        *dhidden.shape,
        CODE[activation],
        DTYPE_CODE[pre.dtype],
        DTYPE_CODE[dtype],
    )
    return dbias


class _Sum:
    """The sum over the blocks of a.T @ b: written at once where there is one block, else kept in float32."""

    def __init__(self, like: Tensor, wanted: bool, blocks: int, dtype: torch.dtype) -> None:
        self.wanted, self.first, self.dtype = wanted, True, dtype
        self.total = memory.empty(like.shape if wanted else (0,), dtype if blocks == 1 else torch.float32)
        if not blocks:
            self.total.zero_()

    def add(self, a: Tensor, b: Tensor) -> None:
        if not self.wanted:
            return
        products.mm(a.t(), b, self.total, accumulate=not self.first)
        self.first = False

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


class _LinearGradients:
    """dx, and in `dtype` dweight and dbias, of pre = x @ weight.T + bias, from the blocks of dpre; empty where nobody
    asks."""

    def __init__(self, x: Tensor, weight: Tensor, needs: list[bool], blocks: int, dtype: torch.dtype) -> None:
        self.needs_dx, _, self.needs_dbias = needs
        self.x, self.weight = x.reshape(-1, x.shape[-1]), weight
        self.dx = memory.empty(x.shape if self.needs_dx else (0,), x.dtype)
        self.dweight, self.dtype = _Sum(weight, needs[1], blocks, dtype), dtype
        self.dbiases: list[Tensor] = []

    def add(self, block: slice, dpre: Tensor, dbias: Tensor | None) -> None:
        if self.needs_dx:
            products.mm(dpre, self.weight, _part(self.dx.view(self.x.shape), block))
        self.dweight.add(dpre, _part(self.x, block))
        if dbias is not None:
            self.dbiases.append(dbias)

    def dbias(self) -> Tensor:
        if not self.needs_dbias:
            return self.weight.new_empty(0, dtype=self.dtype)
        if len(self.dbiases) == 1:
            return self.dbiases[0]
        total = self.weight.new_zeros(self.weight.shape[0], dtype=torch.float32)
        for part in self.dbiases:
            total += part
        return total.to(self.dtype)
