"""linear_cross_entropy on the GPU: blocks of rows against the whole vocabulary, in one workspace.

A block's logits become the gradient of the logits in place (csrc/cross_entropy), and are gone before the next. The
gradient of the weights is added up in float32 by the product itself: by csrc/gemm, or by the library where that makes
float32 products, of rows that were scaled before. Nothing waits for the device: rows whose target is ignored are
computed like the others, and have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import gemm, memory, native
from fastlm.ops.checks import autocast_off
from fastlm.ops.linear_cross_entropy.native import unsupported
from fastlm.ops.linear_cross_entropy.reference import check_targets
from fastlm.ops.native import DTYPE_CODE, pointer

__all__ = ["backward", "forward", "unsupported"]

# Bytes of the workspace, beside which nothing grows with the vocabulary but the weights and their gradient: 2,663 rows
# of GPT-2's vocabulary in half precision. Each block reads and writes that gradient, 309 MB in float32, while its three
# products take 0.6 TFLOP: at 3 TB/s and 600 TFLOP/s a tenth of the time. With 48 MB it would be a third.
BLOCK_BYTES = 256 << 20

# A block is a multiple of these rows: every tile of its products is full, on Hopper, where they go in pairs, too.
_ROWS = 256
_COLUMNS = 64  # rows of logits begin on a 128-byte line


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
    loss, lse = (x.new_empty(len(work.rows), dtype=torch.float32) for _ in range(2))
    count = (work.targets != ignore_index).sum()
    inverse = count.clamp(min=1).float().reciprocal() if reduction == "mean" else None
    work.run(loss, lse, None, (label_smoothing, z_loss, softcap), inverse)
    if reduction == "none":
        losses, lses = (memory.reshaped(t, *targets.shape) for t in (loss, lse))
        return losses, lses, work.dx, work.dweight
    total = loss.sum(dtype=torch.float64)
    total = (total / count if reduction == "mean" else total).float()
    return total, lse.new_empty(0), work.dx, work.dweight


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
    work.run(None, lse.reshape(-1), dloss.reshape(-1).contiguous(), (label_smoothing, z_loss, softcap), None)
    return work.dx, work.dweight


class _Work:
    """The rows, and the gradients dx and dweight (float32) that their blocks add up to."""

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs: list[bool]) -> None:
        self.weight, self.ignore_index = weight, ignore_index
        self.needs_dx, self.needs_dweight = needs
        self.targets = targets.reshape(-1).contiguous()
        check_targets(self.targets, len(weight), ignore_index)
        rows = x.reshape(-1, x.shape[-1])
        self.rows = rows if rows.stride(1) == 1 else rows.contiguous()
        self.dx = x.new_empty(x.shape if self.needs_dx else (0,), dtype=torch.float32)
        make = torch.empty if len(rows) else torch.zeros
        self.dweight = make(weight.shape if self.needs_dweight else (0,), dtype=torch.float32, device=x.device)
        self.library = gemm.library_is_faster(x)

    def run(
        self,
        loss: Tensor | None,
        lse: Tensor,
        dloss: Tensor | None,
        options: tuple[float, float, float],
        scale: Tensor | None,
    ) -> None:
        """The kernels over the blocks; `scale` multiplies the gradients. With `loss`, loss and lse are written."""
        count, vocab = len(self.rows), len(self.weight)
        wanted = self.needs_dx or self.needs_dweight
        if count == 0 or (loss is None and not wanted):
            return
        stride = -(-vocab // _COLUMNS) * _COLUMNS
        step = block_rows(count, stride * self.rows.element_size())
        buffer = self.rows.new_empty(min(step, count), stride)
        if stride > vocab:
            buffer[:, vocab:].zero_()  # read with the last logits, in whole vectors
        with autocast_off(self.rows):
            for start in range(0, count, step):
                block = slice(start, min(start + step, count))
                logits = self._logits(block, buffer[: block.stop - start, :vocab])
                native.C.cross_entropy_block_cuda(
                    logits.data_ptr(),
                    self.targets[block].data_ptr(),
                    0 if loss is None else loss[block].data_ptr(),
                    lse[block].data_ptr(),
                    0 if dloss is None else pointer(dloss[block]),
                    *logits.shape,
                    stride,
                    self.ignore_index,
                    *options,
                    wanted,
                    DTYPE_CODE[logits.dtype],
                    native.stream(logits),
                )
                self._add(block, logits, scale)

    def _logits(self, block: slice, out: Tensor) -> Tensor:
        if self.library:
            return torch.mm(self.rows[block], self.weight.T, out=out)
        return gemm.product(self.rows[block], self.weight, out)

    def _add(self, block: slice, dlogits: Tensor, scale: Tensor | None) -> None:
        if self.needs_dx:
            dx = self.dx.view(self.rows.shape)[block]
            gemm.product(dlogits, self.weight.T, dx, scale=None if self.library else scale)
            if self.library and scale is not None:
                dx.mul_(scale)
        if self.needs_dweight:
            more, rows = block.start > 0, self.rows[block]
            if scale is not None and gemm.library_makes_float32(rows):
                rows, scale = rows * scale, None
            gemm.product(dlogits.T, rows.T, self.dweight, scale=scale, accumulate=more)


def block_rows(rows: int, row_bytes: int) -> int:
    """Rows of a block: as many as BLOCK_BYTES hold, cut so that the blocks are about equal and multiples of _ROWS."""
    most = max(1, BLOCK_BYTES // row_bytes)
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // _ROWS) * _ROWS)
