"""The kernel of rotary positions."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length", "table_rows", "table_batch", "position_batch", "x_batch", "y_batch"])
def turn(
    x,  # (B, T, H, D), the last dimension contiguous
    y,  # likewise; may be x
    cos,  # (P, half), or with table_batch (B, T, half), float32
    sin,
    positions,  # (T), or with position_batch (B, T); None: the token's own place
    length: tl.int32,
    heads: tl.int32,
    width: tl.int32,
    half: tl.int32,
    table_rows: tl.int64,
    table_batch: tl.int64,
    position_batch: tl.int64,
    x_batch: tl.int64,
    x_token: tl.int64,
    x_head: tl.int64,
    y_batch: tl.int64,
    y_token: tl.int64,
    y_head: tl.int64,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    COPY: tl.constexpr,  # the dimensions that are not turned
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    row = token
    known = token >= 0
    if positions is not None:
        row = tl.load(positions + batch * position_batch + token).to(tl.int64)
        known = (row >= 0) & (row < table_rows)
    place = batch * table_batch + tl.where(known, row, 0) * half + pair
    # Looking for a position outside of the tables would wait for the device: the token becomes NaN.
    c = tl.where(known, tl.load(cos + place, mask=pair < half, other=0.0), float("nan"))[None, :]
    s = tl.where(known, tl.load(sin + place, mask=pair < half, other=0.0), float("nan"))[None, :]
    if INVERSE:
        s = -s
    x += batch * x_batch + token * x_token
    y += batch * y_batch + token * y_token
    first = (2 * pair if INTERLEAVED else pair)[None, :]
    second = first + (1 if INTERLEAVED else half)
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    x_row, y_row = head[:, None] * x_head, head[:, None] * y_head
    a = tl.load(x + x_row + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + x_row + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + y_row + first, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(y + y_row + second, (b * c + a * s).to(y.dtype.element_ty), mask=inside)
    if COPY:
        column = 2 * half + tl.arange(0, REST)
        inside = (head < heads)[:, None] & (column < width)[None, :]
        value = tl.load(x + x_row + column[None, :], mask=inside, other=0.0)
        tl.store(y + y_row + column[None, :], value, mask=inside)
