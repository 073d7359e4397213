"""linear_cross_entropy on the CPU: matrix products (products.py), the loss and the gradient of a block of logits by the
C++ kernel, in place.

Rows whose target is ignored are left out before the first product. The logits have x's dtype; where products of half
precision are made in float32 (`products.py`), so are the logits, and nothing is rounded on the way to the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import memory, native, products
from fastlm.ops.checks import autocast_off
from fastlm.ops.linear_cross_entropy.reference import block_rows, check_targets
from fastlm.ops.native import DTYPE_CODE

# Where the product is of half precision, dweight is summed in float32 beside it: so many bytes of the vocabulary at a
# time.
_SLICE_BYTES = 16 << 20

# Where a product is made in float32, so many bytes of the weights are converted at a time: with a block of logits it is
# what there is beside the inputs and the gradients.
_WIDE_BYTES = 4 << 20

# Each block reads the weights and dweight once more. So a large batch, whose activations are far larger than that, has
# blocks of an eighth of its rows, up to this many: 4,096 rows of width 384 take 0.86 of the time that they take in
# blocks of 208, 2,560 rows of width 768 0.95 (vocabulary 50,304, float32, two cores of a Cascade Lake Xeon).
_MANY_ROWS = 512


def unsupported(x: Tensor, *rest: object) -> str | None:
    if x.dtype not in DTYPE_CODE:
        return f"its kernels are for float32, bfloat16 and float16, got {x.dtype}"
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
    work = _Work(x, weight, targets, ignore_index, needs if reduction != "none" else [False, False])
    count = len(work.targets)
    loss, lse = memory.empty((count,), torch.float32), memory.empty((count,), torch.float32)
    # The mean's 1 / N goes into each row's gradient; in half precision, too narrow for it, to the sums.
    inverse = 1.0 / count if reduction == "mean" and count else 1.0
    fold = work.exact
    work.run(loss, lse, None, (label_smoothing, z_loss, softcap, inverse if fold else 1.0))
    if not fold and inverse != 1.0:
        work.dx.mul_(inverse)
        work.dweight.mul_(inverse)
    if reduction == "none":
        losses, lses = (memory.reshaped(work.spread(t), *targets.shape) for t in (loss, lse))
        return losses, lses, work.dx, work.dweight
    total = loss.sum(dtype=torch.float64)
    total = (total / count if reduction == "mean" else total).float()
    return total, lse.new_empty(0), work.whole_dx(x), work.dweight


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
    work = _Work(x, weight, targets, ignore_index, needs)
    dlosses, lses = work.gather(dloss.reshape(-1)).contiguous(), work.gather(lse.reshape(-1))
    work.run(None, lses, dlosses, (label_smoothing, z_loss, softcap, 1.0))
    return work.whole_dx(x), work.dweight


class _Work:
    """The rows that count, and the gradients dx and dweight (float32) that their blocks add up to."""

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs: list[bool]) -> None:
        self.weight = weight
        self.needs_dx, self.needs_dweight = needs
        flat = targets.reshape(-1)
        self.length = len(flat)
        self.index = None
        if check_targets(flat, len(weight), ignore_index):
            counted = flat != ignore_index
            self.index = None if counted.all() else counted.nonzero().squeeze(1)
        self.targets = self.gather(flat).contiguous()
        self.rows = self.gather(x.reshape(-1, x.shape[-1]))
        if products.widens(x.dtype):
            self.rows = memory.empty(self.rows.shape, torch.float32).copy_(self.rows)
        self.exact = self.rows.dtype == torch.float32
        self.dx = memory.empty(self.rows.shape if self.needs_dx else (0,), torch.float32)
        self.dweight = memory.empty(weight.shape if self.needs_dweight else (0,), torch.float32)
        if not len(self.targets):
            self.dweight.zero_()

    def gather(self, t: Tensor) -> Tensor:
        return t if self.index is None else t[self.index]

    def spread(self, t: Tensor) -> Tensor:
        """The opposite of gather, with zeros for the rows that were ignored."""
        if self.index is None:
            return t
        return t.new_zeros(self.length, *t.shape[1:]).index_copy_(0, self.index, t)

    def whole_dx(self, x: Tensor) -> Tensor:
        return self.spread(self.dx).view(x.shape) if self.needs_dx else self.dx

    def run(
        self, loss: Tensor | None, lse: Tensor, dloss: Tensor | None, options: tuple[float, float, float, float]
    ) -> None:
        """The kernel over the blocks. With `loss`, loss and lse are written; else lse is read."""
        count, vocab = len(self.rows), len(self.weight)
        step = max(block_rows(count, vocab, self.rows.element_size()), min(_MANY_ROWS, count // 8 // 16 * 16))
        wanted = self.needs_dx or self.needs_dweight
        if loss is None and not wanted:
            return
        buffer = memory.empty((min(step, count), vocab), self.rows.dtype)
        with autocast_off(self.rows):
            for start in range(0, count, step):
                block = slice(start, min(start + step, count))
                logits = buffer[: block.stop - start]
                products.mm(self.rows[block], self.weight.T, logits, piece_bytes=_WIDE_BYTES)
                native.C.cross_entropy_block(
                    logits.data_ptr(),
                    self.targets[block].data_ptr(),
                    0 if loss is None else loss[block].data_ptr(),
                    lse[block].data_ptr(),
                    0 if dloss is None else dloss[block].data_ptr(),
                    *logits.shape,
                    *options,
                    wanted,
                    DTYPE_CODE[logits.dtype],
                )
                self._add(block, logits)

    def _add(self, block: slice, dlogits: Tensor) -> None:
        x, later = self.rows[block], block.start > 0
        if self.needs_dx:
            products.mm(dlogits, self.weight, self.dx[block], piece_bytes=_WIDE_BYTES)
        if not self.needs_dweight:
            return
        step = len(self.weight) if self.exact else max(1, _SLICE_BYTES // max(1, x.shape[1] * x.element_size()))
        for total, d in zip(self.dweight.split(step), dlogits.split(step, 1), strict=True):
            products.mm(d.T, x, total, accumulate=later)
