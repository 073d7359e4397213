"""The sum of squares of many tensors: a program for each chunk, and one that adds the chunks up in their order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first"])
def squares(
    gradient,  # (n), contiguous
    sums,  # (chunks of all tensors) float64
    n: tl.int64,
    first: tl.int64,  # this tensor's first chunk
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        i = program * CHUNK + start + tl.arange(0, BLOCK)
        value = tl.load(gradient + i, mask=i < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(sums + first + program, tl.sum(total.to(tl.float64), 0))


@triton.jit(do_not_specialize=["chunks"])
def finish(
    sums,  # (chunks) float64
    result,  # (2) float32: the norm, the factor
    chunks: tl.int64,
    max_norm: tl.float32,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, chunks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums + i, mask=i < chunks, other=0.0)
    norm = tl.sqrt(tl.sum(total, 0)).to(tl.float32)
    factor = tl.minimum(max_norm / (norm + 1e-6), 1.0)
    finite = norm - norm == 0.0
    tl.store(result, norm)
    tl.store(result + 1, tl.where(finite, factor, float("nan")))
