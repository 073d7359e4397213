"""One step of an LSTM, forward and backward: the product with the recurrent weight, and in its epilogue the gates and
the cell. A program has a tile of rows of the batch and of hidden units, and all four gates of them.

What changes from step to step and from batch to batch makes no new kernel: tensors are handed over whole, with the
number of the step.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Within a few units in the last place everywhere: what a step gets wrong, the next ones multiply.

    (1 - e) / (1 + e) with e = exp(-2|x|), which cannot overflow; near 0, where 1 - e cancels, its series.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - e) / (1.0 + e)
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.0625, series, tl.where(x < 0.0, -quotient, quotient))


@triton.jit(do_not_specialize=["batch", "steps", "t", "batch_stride", "step_stride"])
def step(
    gates,  # (batch, steps, 4 hidden): the input's part; where weight is None, with the recurrent part added
    h,  # (batch, hidden), contiguous: the hidden state before
    weight,  # (4 hidden, hidden), contiguous, or None
    c,  # (batch, hidden) float32, contiguous: the cell before, replaced by the cell after
    h_next,  # (batch, hidden), contiguous: the hidden state after
    y,  # (batch, steps, hidden), contiguous: the hidden states
    cells,  # (batch, steps, hidden) float32, contiguous
    activations,  # (batch, steps, 4 hidden) float32, contiguous: i, f, g, o
    batch: tl.int32,
    hidden: tl.int32,
    steps: tl.int32,
    t: tl.int32,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    EVEN: tl.constexpr,  # BK divides hidden
    BM: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    unit = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = (row < batch)[:, None] & (unit < hidden)[None, :]
    place = gates + row[:, None] * batch_stride + t * step_stride + unit[None, :]
    z_in = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    z_forget = tl.load(place + hidden, mask=inside, other=0.0).to(tl.float32)
    z_cell = tl.load(place + 2 * hidden, mask=inside, other=0.0).to(tl.float32)
    z_out = tl.load(place + 3 * hidden, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        k = tl.arange(0, BK)
        gate = hidden.to(tl.int64) * hidden  # of weight's elements
        left = h + row[:, None] * hidden + k[None, :]
        right = weight + unit.to(tl.int64)[None, :] * hidden + k[:, None]
        for start in range(0, hidden, BK):
            mask_left, mask_right = (row < batch)[:, None], (unit < hidden)[None, :]
            if not EVEN:
                mask_left &= (k < hidden - start)[None, :]
                mask_right &= (k < hidden - start)[:, None]
            before = tl.load(left, mask=mask_left, other=0.0)
            z_in = tl.dot(before, tl.load(right, mask=mask_right, other=0.0), z_in)
            z_forget = tl.dot(before, tl.load(right + gate, mask=mask_right, other=0.0), z_forget)
            z_cell = tl.dot(before, tl.load(right + 2 * gate, mask=mask_right, other=0.0), z_cell)
            z_out = tl.dot(before, tl.load(right + 3 * gate, mask=mask_right, other=0.0), z_out)
            left += BK
            right += BK
    i, f, g, o = tl.sigmoid(z_in), tl.sigmoid(z_forget), tanh(z_cell), tl.sigmoid(z_out)
    state = row[:, None] * hidden + unit[None, :]
    cell = f * tl.load(c + state, mask=inside, other=0.0) + i * g
    tl.store(c + state, cell, mask=inside)
    result = (o * tanh(cell)).to(y.dtype.element_ty)
    tl.store(h_next + state, result, mask=inside)
    token = row[:, None] * steps + t
    tl.store(y + token * hidden + unit[None, :], result, mask=inside)
    tl.store(cells + token * hidden + unit[None, :], cell, mask=inside)
    place = activations + token * (4 * hidden) + unit[None, :]
    tl.store(place, i, mask=inside)
    tl.store(place + hidden, f, mask=inside)
    tl.store(place + 2 * hidden, g, mask=inside)
    tl.store(place + 3 * hidden, o, mask=inside)


@triton.jit(do_not_specialize=["batch", "steps", "t", "batch_stride", "step_stride"])
def step_backward(
    dy,  # (batch, steps, hidden), the last dimension contiguous
    dh,  # (batch, hidden) float32, contiguous: from the next step; None where it is computed here, or 0
    weight,  # (4 hidden, hidden), contiguous; None where dh is given, and at the last step
    dc,  # (batch, hidden) float32, contiguous: the gradient of the cell after, replaced by that of the cell before
    c0,  # (batch, hidden) float32, contiguous
    cells,  # (batch, steps, hidden) float32, contiguous
    activations,  # (batch, steps, 4 hidden) float32, contiguous
    dgates,  # (batch, steps, 4 hidden), contiguous: read at the next step, written at this one
    batch: tl.int32,
    hidden: tl.int32,
    steps: tl.int32,
    t: tl.int32,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    EVEN: tl.constexpr,  # BK divides 4 hidden
    BM: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    unit = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = (row < batch)[:, None] & (unit < hidden)[None, :]
    token = row[:, None] * steps + t
    total = tl.zeros((BM, BH), dtype=tl.float32)
    if weight is not None:
        k = tl.arange(0, BK)
        width = 4 * hidden
        left = dgates + (token + 1) * width + k[None, :]
        right = weight + k.to(tl.int64)[:, None] * hidden + unit[None, :]
        for start in range(0, width, BK):
            mask_left, mask_right = (row < batch)[:, None], (unit < hidden)[None, :]
            if not EVEN:
                mask_left &= (k < width - start)[None, :]
                mask_right &= (k < width - start)[:, None]
            total = tl.dot(tl.load(left, mask=mask_left, other=0.0), tl.load(right, mask=mask_right, other=0.0), total)
            left += BK
            right += hidden.to(tl.int64) * BK
    state = row[:, None] * hidden + unit[None, :]
    if dh is not None:
        total += tl.load(dh + state, mask=inside, other=0.0)
    place = dy + row[:, None] * batch_stride + t * step_stride + unit[None, :]
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    place = activations + token * (4 * hidden) + unit[None, :]
    i = tl.load(place, mask=inside, other=0.0)
    f = tl.load(place + hidden, mask=inside, other=0.0)
    g = tl.load(place + 2 * hidden, mask=inside, other=0.0)
    o = tl.load(place + 3 * hidden, mask=inside, other=0.0)
    place = cells + token * hidden + unit[None, :]
    squashed = tanh(tl.load(place, mask=inside, other=0.0))
    first = token == row[:, None] * steps  # t is 0
    before = tl.load(place - hidden, mask=inside & ~first, other=0.0)
    before += tl.load(c0 + state, mask=inside & first, other=0.0)
    dcell = tl.load(dc + state, mask=inside, other=0.0) + total * o * (1.0 - squashed * squashed)
    tl.store(dc + state, dcell * f, mask=inside)
    place = dgates + token * (4 * hidden) + unit[None, :]
    kind = dgates.dtype.element_ty
    tl.store(place, (dcell * g * i * (1.0 - i)).to(kind), mask=inside)
    tl.store(place + hidden, (dcell * before * f * (1.0 - f)).to(kind), mask=inside)
    tl.store(place + 2 * hidden, (dcell * i * (1.0 - g * g)).to(kind), mask=inside)
    tl.store(place + 3 * hidden, (total * squashed * o * (1.0 - o)).to(kind), mask=inside)
