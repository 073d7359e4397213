"""Sampling: one program a row, which goes over its logits several times (they stay in the cache).

The weights are integers, as in the other backends (csrc/sampling/sample.h), so that sums are exact in any order. The
k-th largest logit and the last one that top-p keeps are found bit by bit: 32 times the row for each of the two.
"""

import triton
import triton.language as tl

ONE: tl.constexpr = tl.constexpr(1099511627776.0)  # 2^40: the weight of the most likely token


@triton.jit
def _values(logits, start, V, temperature, BLOCK: tl.constexpr):
    """(places, logits over the temperature in float32; -inf beyond the row)"""
    i = start + tl.arange(0, BLOCK)
    x = tl.load(logits + i, mask=i < V, other=-float("inf")).to(tl.float32)
    return i, tl.div_rn(x, temperature + tl.zeros((BLOCK,), tl.float32))


@triton.jit
def _order(x):
    """Integers from 0 to 2^32 - 1 in the order of the numbers."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def _weights(x, largest):
    return (tl.exp(x - largest) * ONE).to(tl.int64)


@triton.jit
def sample(
    logits,  # (rows, V), rows `stride` apart
    ids,  # (rows) int64
    rng_state,  # (2) or (rows, 2) int64: seed and offset; None where greedy
    V: tl.int32,
    stride: tl.int64,
    temperature: tl.float32,
    top_k: tl.int32,  # 0: all
    top_p_bits: tl.int64,  # of the float64
    log_min_p: tl.float32,
    STATE_A_ROW: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    largest, bad = -float("inf"), 0
    for start in range(0, V, BLOCK):
        i, x = _values(logits, start, V, temperature, BLOCK)
        bad += tl.sum((x != x).to(tl.int32), 0)
        largest = tl.maximum(largest, tl.max(tl.where(x == x, x, -float("inf")), 0))
    if bad > 0 or largest == float("inf") or largest == -float("inf"):
        tl.store(ids + row, -1)
    elif rng_state is None:
        first = V
        for start in range(0, V, BLOCK):
            i, x = _values(logits, start, V, temperature, BLOCK)
            first = tl.minimum(first, tl.min(tl.where(x == largest, i, V), 0))
        tl.store(ids + row, first.to(tl.int64))
    else:
        lowest = tl.zeros((), tl.int64)  # of the order of what top-k keeps
        if TOP_K:
            for step in range(32):
                candidate = lowest | (tl.full((), 1, tl.int64) << (31 - step))
                count = tl.zeros((), tl.int32)
                for start in range(0, V, BLOCK):
                    i, x = _values(logits, start, V, temperature, BLOCK)
                    count += tl.sum(((_order(x) >= candidate) & (i < V)).to(tl.int32), 0)
                lowest = tl.where(count >= top_k, candidate, lowest)
        ties = tl.full((), 1, tl.int64) << 40  # how many of those at `lowest` are kept
        if TOP_P:
            total = tl.zeros((), tl.int64)
            for start in range(0, V, BLOCK):
                i, x = _values(logits, start, V, temperature, BLOCK)
                total += tl.sum(tl.where(_order(x) >= lowest, _weights(x, largest), 0), 0)
            top_p = top_p_bits.to(tl.float64, bitcast=True)
            wanted = tl.maximum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), 1)
            bound = tl.zeros((), tl.int64)
            for step in range(32):
                candidate = bound | (tl.full((), 1, tl.int64) << (31 - step))
                reached = tl.zeros((), tl.int64)
                for start in range(0, V, BLOCK):
                    i, x = _values(logits, start, V, temperature, BLOCK)
                    order = _order(x)
                    reached += tl.sum(tl.where((order >= candidate) & (order >= lowest), _weights(x, largest), 0), 0)
                bound = tl.where(reached >= wanted, candidate, bound)
            lowest = tl.maximum(bound, lowest)
            before, one = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
            for start in range(0, V, BLOCK):
                i, x = _values(logits, start, V, temperature, BLOCK)
                order, weight = _order(x), _weights(x, largest)
                before += tl.sum(tl.where(order > lowest, weight, 0), 0)
                one = tl.maximum(one, tl.max(tl.where(order == lowest, weight, 0), 0))
            one = tl.maximum(one, 1)
            ties = (wanted - before + one - 1) // one
        # All that is left, then the place at which its running sum exceeds R * all / 2^64.
        everything = tl.zeros((), tl.int64)
        seen = tl.zeros((), tl.int64)
        for start in range(0, V, BLOCK):
            i, x = _values(logits, start, V, temperature, BLOCK)
            weight, at = _kept(i, x, largest, lowest, ties, seen, log_min_p, V, MIN_P)
            everything += tl.sum(weight, 0)
            seen += tl.sum(at, 0)
        state = rng_state + (2 * row if STATE_A_ROW else 0)
        seed, offset = tl.load(state), (tl.load(state + 1) & 0xFFFFFFFF).to(tl.uint32)
        counter = tl.zeros((1,), tl.uint32)
        own = counter
        if not STATE_A_ROW:
            own += row.to(tl.uint32)
        low, high, _, _ = tl.philox(seed, own, counter, counter, counter + offset)
        random = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        left = tl.sum(tl.umulhi(random, everything.to(tl.uint64) + tl.zeros((1,), tl.uint64)).to(tl.int64), 0)
        running, place = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
        seen = tl.zeros((), tl.int64)
        for start in range(0, V, BLOCK):
            i, x = _values(logits, start, V, temperature, BLOCK)
            weight, at = _kept(i, x, largest, lowest, ties, seen, log_min_p, V, MIN_P)
            sums = running + tl.cumsum(weight, 0)
            place += tl.sum(((sums <= left) & (i < V)).to(tl.int64), 0)
            running += tl.sum(weight, 0)
            seen += tl.sum(at, 0)
        tl.store(ids + row, place)


@triton.jit
def _kept(i, x, largest, lowest, ties, seen, log_min_p, V, MIN_P: tl.constexpr):
    """The weights of a block, 0 for what is left out, and which stand at the bound; `seen`: those of earlier blocks."""
    order = _order(x)
    at = ((order == lowest) & (i < V)).to(tl.int64)
    keep = (order > lowest) | ((at != 0) & (seen + tl.cumsum(at, 0) <= ties))
    if MIN_P:
        keep = keep & (x >= largest + log_min_p)
    return tl.where(keep, _weights(x, largest), 0), at
