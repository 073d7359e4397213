"""The loss of a language-model head in plain PyTorch, block by block: the oracle of every other backend.

A block is some rows of x against the whole vocabulary. Its logits (in the dtype of x; float32 beside them for bfloat16
and float16) are turned into the loss and, in place, into the gradient of the logits, and are gone before the next.
Wijmans et al.: Cut Your Losses in Large-Vocabulary Language Models (arXiv:2411.09009); Hsu et al.: Liger Kernel
(arXiv:2410.10989), for making the gradients in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops import memory
from fastlm.ops.checks import autocast_off, statistics_dtype

# Bytes of one block of logits. Each block reads the weights twice and reads and writes dweight once, so a block must
# have many rows; yet there should be little of it beside the inputs and the gradients. The three matrix products of the
# head 1024 x 768 x 50304 in float32, on one core of an Ice Lake Xeon (rows of a block: ms of CPU time, best of 4):
# 128: 1982, 192: 1902, 208: 1999, 256: 1974, 512: 1909, 1024: 1879. With 64 and fewer the products alone double.
BLOCK_BYTES = 48 << 20
MAX_ROWS = 4096  # with a small vocabulary a block of 48 MB would be most of the batch, to no gain


def block_rows(rows: int, vocab: int, element_size: int) -> int:
    """Rows of a block: as many as BLOCK_BYTES hold, cut so that the blocks are about equal and multiples of 16."""
    most = max(1, min(MAX_ROWS, BLOCK_BYTES // (max(vocab, 1) * element_size)))
    even = -(-rows // -(-rows // most)) if rows else 1
    return min(most, -(-even // 16) * 16)


class Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


def unsupported(*call: object) -> str | None:
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, lse (only for "none"), and for "mean" and "sum" the gradients dx and dweight of the loss."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    wide = statistics_dtype(x)
    check_targets(targets, weight.shape[0], ignore_index)
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)  # (N, C), (N)
    loss, lse = rows.new_empty(len(rows), dtype=wide), rows.new_empty(len(rows), dtype=wide)  # (N)
    gradients = Gradients(rows, weight, needs if reduction != "none" else [False, False])
    scale = row_scale(flat, len(weight), ignore_index, wide)
    count = (flat != ignore_index).sum()
    # The mean's 1 / N goes into each row's gradient; in half precision, too narrow for it, to the sums.
    fold = reduction == "mean" and x.dtype == wide
    with autocast_off(x):
        for block, logits in blocks(rows, weight):
            z = logits.to(wide)
            factor = scale[block] / count.clamp(min=1) if fold else scale[block]
            loss[block], lse[block] = softmax_loss_(z, flat[block], factor, options, None, gradients.wanted())
            gradients.add(z, block)
    loss = torch.where(flat == ignore_index, 0, loss * scale)  # NaN where the target is out of range
    if reduction == "none":
        losses, lses = (memory.reshaped(t, *targets.shape) for t in (loss, lse))
        return losses, lses, gradients.dx, gradients.dweight
    if reduction == "mean" and not fold:
        gradients.divide_(count.clamp(min=1))
    loss = loss.sum() / count if reduction == "mean" else loss.sum()
    return loss, lse.new_empty(0), gradients.dx.view(x.shape if needs[0] else 0), gradients.dweight


def backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """dx and dweight for reduction "none": the logits are computed once more, and their softmax from lse."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    rows, flat, lse = x.reshape(-1, x.shape[-1]), targets.reshape(-1), lse.reshape(-1)
    scale = row_scale(flat, len(weight), ignore_index, lse.dtype) * dloss.reshape(-1)
    gradients = Gradients(rows, weight, needs)
    with autocast_off(x):
        for block, logits in blocks(rows, weight):
            z = logits.to(lse.dtype)
            softmax_loss_(z, flat[block], scale[block], options, lse[block], True)
            gradients.add(z, block)
    return gradients.dx.view(x.shape if needs[0] else 0), gradients.dweight


def check_targets(targets: Tensor, vocab: int, ignore_index: int) -> bool:
    """IndexError for a target outside the vocabulary. On the CPU only: elsewhere it would wait for the device.

    Returns whether some target may be ignore_index.
    """
    if targets.device.type != "cpu" or targets.numel() == 0:
        return True
    low, high = (int(t) for t in targets.aminmax())
    if low >= 0 and high < vocab:
        return low <= ignore_index <= high
    wrong = targets[((targets < 0) | (targets >= vocab)) & (targets != ignore_index)]
    if wrong.numel():
        raise IndexError(
            f"linear_cross_entropy: target {int(wrong[0])} is outside the vocabulary: wanted 0 <= target < {vocab}, the"
            f" rows of weight, or ignore_index = {ignore_index}"
        )
    return True


def row_scale(targets: Tensor, vocab: int, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """(N): 1, or 0 where the target is ignored, or NaN where it is out of range (where nothing could be raised)."""
    scale = (targets != ignore_index).to(dtype)
    return scale.masked_fill(((targets < 0) | (targets >= vocab)) & (targets != ignore_index), float("nan"))


def blocks(rows: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(slice of the rows, their logits): the logits are one buffer, overwritten by the next block."""
    step = block_rows(len(rows), len(weight), rows.element_size())
    buffer = rows.new_empty(min(step, len(rows)), len(weight))
    for start in range(0, len(rows), step):
        block = slice(start, min(start + step, len(rows)))
        yield block, torch.mm(rows[block], weight.T, out=buffer[: block.stop - start])


def softmax_loss_(
    z: Tensor, targets: Tensor, scale: Tensor, options: Options, lse: Tensor | None, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of a block of logits z (n, V); z is overwritten by the loss's gradient times scale (n)."""
    _, smoothing, z_loss, softcap = options
    vocab = z.shape[1]
    at_target = torch.arange(len(z), device=z.device), targets.clamp(0, vocab - 1)
    slope = None
    if softcap:
        z.div_(softcap).tanh_()
        slope = 1 - z.square() if needs_gradient else None  # of softcap * tanh(z / softcap)
        z.mul_(softcap)
    target_logit = z[at_target]
    mean_logit = z.mean(1) if smoothing else target_logit
    if lse is None:
        highest = z.amax(1, keepdim=True)
        total = z.sub_(highest).exp_().sum(1, keepdim=True)
        lse = (highest + total.log()).squeeze(1)
        if needs_gradient:
            z.div_(total)  # the softmax
    else:
        z.sub_(lse[:, None]).exp_()
    loss = (1 - smoothing) * (lse - target_logit) + smoothing * (lse - mean_logit)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if needs_gradient:
        if z_loss:
            z.mul_((1 + 2 * z_loss * lse)[:, None])
        if smoothing:
            z.sub_(smoothing / vocab)
        z[at_target] -= 1 - smoothing
        if slope is not None:
            z.mul_(slope)
        z.mul_(scale[:, None])
    return loss, lse


class Gradients:
    """dx and dweight (float32, float64 for float64), to which each block adds its part; empty where nobody asks."""

    def __init__(self, rows: Tensor, weight: Tensor, needs: list[bool]) -> None:
        self.rows, self.weight = rows, weight
        self.needs_dx, self.needs_dweight = needs
        wide = statistics_dtype(rows)
        self.dx = rows.new_empty(rows.shape if self.needs_dx else 0, dtype=wide)
        self.dweight = weight.new_zeros(weight.shape if self.needs_dweight else 0, dtype=wide)

    def wanted(self) -> bool:
        return self.needs_dx or self.needs_dweight

    def add(self, dlogits: Tensor, block: slice) -> None:
        """dlogits (rows of the block, V), float32; the products are in the dtype of x, their sum in float32."""
        x = self.rows[block]
        d = dlogits.to(x.dtype)
        if self.needs_dx:
            self.dx[block] = d @ self.weight
        if self.needs_dweight and d.dtype == self.dweight.dtype:
            self.dweight.addmm_(d.T, x)
        elif self.needs_dweight:
            self.dweight.add_(d.T @ x)

    def divide_(self, count: Tensor) -> None:
        self.dx.div_(count)
        self.dweight.div_(count)
