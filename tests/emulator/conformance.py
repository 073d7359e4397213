"""What every conformance kernel must write, computed by NumPy from what it reads.

The numbers are small integers wherever something is summed, so every order of summation gives the same bits, on the
emulator and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

SWIZZLES = {"none": 0, "b32": 32, "b64": 64, "b128": 128}


@dataclass
class Example:
    """One run of a kernel: the words it reads, those it finds in its output, and those it must leave there."""

    case: str
    read: np.ndarray
    wanted: np.ndarray
    before: np.ndarray | None = None
    relative_error: float | None = None  # compare as float32 to so much; None: to the bit
    label: str = ""

    def __str__(self) -> str:
        return f"{self.case}{self.label}"


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def words(n: int, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(0, 2**32, n, dtype=np.uint32)


def floats(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a, np.float32).view(np.uint32)


def bf16_bits(a: np.ndarray) -> np.ndarray:
    """Rounded to nearest even."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def f16_bits(a: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(a, np.float32).astype(np.float16).view(np.uint16)


def tf32_bits(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a, np.float32).view(np.uint32)


ENCODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {"bf16": bf16_bits, "f16": f16_bits, "tf32": tf32_bits}


def integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return rng(seed).integers(-8, 9, shape).astype(np.float32)


# ---- warps


def warp_examples() -> Iterator[Example]:
    v, lane = words(32), np.arange(32)
    pick = [
        (lane * 7 + 3) % 32,
        lane ^ 5,
        np.where(lane + 3 < 32, lane + 3, lane),
        np.where(lane - 3 >= 0, lane - 3, lane),
        lane // 8 * 8 + (lane + 1) % 8,
        np.where(lane % 8 + 3 < 8, lane + 3, lane),
    ]
    yield Example("shuffles", v, np.concatenate([v[p] for p in pick]))

    bits = np.uint32(1) << lane.astype(np.uint32)
    ballot = np.bitwise_or.reduce(bits[(v & 1) == 1])
    match = [np.bitwise_or.reduce(bits[v % 4 == v[i] % 4]) for i in lane]
    half = np.bitwise_or.reduce(bits[:16][(v[:16] & 2) == 2])
    vote = [np.full(32, ballot), np.full(32, (v > 0xFFFFFFF0).any()), np.full(32, (v < 0xFFFFFFFF).all()), match]
    yield Example("votes", v, np.concatenate([*vote, np.full(16, half)]).astype(np.uint32))

    signed_max = v.view(np.int32).max().view(np.uint32)
    reduced = [v.sum(dtype=np.uint32), v.min(), signed_max]
    reduced += [np.bitwise_and.reduce(v), np.bitwise_or.reduce(v), np.bitwise_xor.reduce(v)]
    yield Example("reductions", v, np.repeat(np.array(reduced, np.uint32), 32))

    yield Example("elect_one", np.zeros(0, np.uint32), np.ones(64, np.uint32))

    v = words(256, 1)
    start = np.array([5, 0, 2**32 - 1, 0, 0, 99], np.uint32)
    sums = [v.sum(dtype=np.uint32) + np.uint32(5), v.max(), v.min(), np.bitwise_xor.reduce(v)]
    sums += [np.float32((v % 16).sum()).view(np.uint32)]
    sums += [np.uint32((99 + 256) % 101)]
    yield Example("atomics", v, np.array(sums, np.uint32), start)

    v = words(256, 2)
    yield Example("named_barriers", v, v.reshape(4, 64)[:, ::-1].reshape(-1))
    yield Example("named_barrier_template", v[:64], v[:64][::-1])

    for some in (0, 1):
        v = words(96, 3)
        v[50] = 0xFFFFFFFF if some else 0
        counted = np.full(96, (v & 1).sum(), np.uint32)
        wanted = np.concatenate([counted, np.full(96, some, np.uint32)])
        yield Example("syncthreads_count", v, wanted, label="-some" if some else "-none")

    a = (rng(4).standard_normal(128) * 10.0 ** rng(5).integers(-6, 5, 128)).astype(np.float32)
    a[:6] = [0, -0.0, np.inf, -np.inf, 65504, 1 + 2**-11]
    low, high = a[:64], a[64:]
    pairs = [enc(low).astype(np.uint32) | enc(high).astype(np.uint32) << 16 for enc in (bf16_bits, f16_bits)]
    tf32 = (low.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    yield Example("conversions", floats(a), np.concatenate([*pairs, tf32]))

    bits = np.resize(
        np.array([0xFFFFFFFF, 0x7FFFFFFF, 0x7FC00000, 0xFFC00000, 0x7F800000, 0x7F7FF000, 0], np.uint32), 32
    )
    yield Example("tf32_of_nan", bits, ((bits & 0x7FFFFFFF) > 0x7F800000).astype(np.uint32))

    a = rng(6).uniform(-4, 4, 64).astype(np.float32)
    wide = a.astype(np.float64)
    values = np.concatenate([2.0**wide, np.tanh(wide), np.log2(np.abs(wide)), 1 / wide])
    yield Example("approximations", floats(a), floats(values), relative_error=2e-3)

    v = words(192, 7).reshape(6, 32)
    total = np.zeros(32, np.uint32)
    for row in v:
        total = total * np.uint32(3) + row
    yield Example("ordered_blocks", v, np.append(total, np.uint32(6)))

    v = words(160, 8)
    doubled = 2 * v
    yield Example("last_block", v, np.concatenate([[doubled.sum(dtype=np.uint32), 5], doubled]).astype(np.uint32))

    v = words(5, 9)
    total = v[1:].sum(dtype=np.uint32)
    yield Example("relaxed_and_added", v, np.array([4, *v[1:], total], np.uint32))


# ---- fragments of mma.sync


def pairs_of(row: np.ndarray) -> np.ndarray:
    """(..., 2 n) 16-bit elements as (..., n) words."""
    return np.ascontiguousarray(row, np.uint16).view(np.uint32)


def a_fragments(a: np.ndarray) -> np.ndarray:
    """(16, 16) 16-bit elements, or (16, 8) of 32 bits, as (32 lanes, 4 registers)."""
    r = pairs_of(a) if a.dtype == np.uint16 else a  # (16, 8)
    g, t = np.divmod(np.arange(32), 4)
    return np.stack([r[g, t], r[g + 8, t], r[g, t + 4], r[g + 8, t + 4]], 1)


def b_fragments(b: np.ndarray) -> np.ndarray:
    """(16, 8) 16-bit elements, or (8, 8) of 32 bits, as (32 lanes, 2 registers)."""
    r = pairs_of(b.T) if b.dtype == np.uint16 else b.T  # (8 columns, 8 words along k)
    g, t = np.divmod(np.arange(32), 4)
    return np.stack([r[g, t], r[g, t + 4]], 1)


def c_fragments(c: np.ndarray) -> np.ndarray:
    """(16, N) float32 as (32 lanes, N / 2 registers)."""
    g, t = np.divmod(np.arange(32), 4)
    columns = np.arange(0, c.shape[1], 8)[None, :, None, None] + 2 * t[:, None, None, None] + np.arange(2)
    rows = g[:, None, None, None] + 8 * np.arange(2)[None, None, :, None] + 0 * columns
    return floats(c[rows, columns + 0 * rows].reshape(32, -1))


def sm80_examples() -> Iterator[Example]:
    matrices = words(128, 10).view(np.uint16).reshape(4, 8, 8)
    lane = np.arange(32)
    for count in (1, 2, 4):
        for transposed in (False, True):
            m = matrices[:count].transpose(0, 2, 1) if transposed else matrices[:count]
            fragments = pairs_of(m)[:, lane // 4, lane % 4].reshape(-1)  # (count, 32)
            stored = pairs_of(matrices[:count]).reshape(-1)
            suffix = f"_{count}_transposed" if transposed else f"_{count}"
            yield Example("ldmatrix" + suffix, matrices.view(np.uint32).reshape(-1), fragments)
            yield Example("stmatrix" + suffix, np.resize(fragments, 128), stored)

    for name, encode in ENCODE.items():
        k = 8 if name == "tf32" else 16
        a, b, c = integers((16, k), 11), integers((k, 8), 12), integers((16, 8), 13)
        read = [a_fragments(encode(a)), b_fragments(encode(b)), c_fragments(c)]
        yield Example(f"mma_{name}", np.concatenate([r.reshape(-1) for r in read]), c_fragments(a @ b + c).reshape(-1))

    v = words(128, 14)
    rows = v.view(np.uint8).reshape(32, 16).copy()
    for i in range(32):
        rows[i, i % 17 :] = 0
    yield Example("cp_async_16_partly", v, rows[::-1].copy().view(np.uint32).reshape(-1))
    some = v.copy().reshape(32, 4)
    some[::3] = 0
    yield Example("cp_async_16_if", v, some[::-1].reshape(-1))
    small = v.copy().reshape(64, 2)
    small[32::2, 0] = 0
    yield Example("cp_async_small", v, np.concatenate([small[:32][::-1], small[32:][::-1]]).reshape(-1))
    v = words(1792, 15)
    yield Example("cp_async_pipeline", v, v.reshape(7, 64, 4)[:, ::-1].reshape(-1))
    v = words(256, 16)
    yield Example("cp_async_mbarrier", v, v.reshape(64, 4)[::-1].reshape(-1))


# ---- TMA

SIZES, BOX = [0, 5, 4, 3, 3], [0, 3, 2, 2, 2]  # conformance_tma.cu
INSIDE, OVERHANGING, STORED = [0, 1, 1, 0, 1], [8, 3, -1, 2, 2], [8, 3, 3, 2, 2]


def swizzle(tile: np.ndarray, width: int) -> np.ndarray:
    """The bytes of a tile whose rows are `width` bytes, as they lie in shared memory: pieces of 16 bytes are exchanged
    within a row, by the row's number in its group of 8 (of 4, of 2 for narrower rows: two rows of 64 bytes share one
    line of 128)."""
    if width == 0:
        return tile
    pieces = tile.reshape(-1, 16)
    i = np.arange(len(pieces))
    line = i // 8  # of 128 bytes
    return pieces[i ^ (line % (width // 16))].reshape(-1)


def box_at(tensor: np.ndarray, at: list[int], box: list[int], fill: float = 0) -> np.ndarray:
    """tensor and box have the slowest dimension first, `at` too."""
    pad = [(8, 8 + b) for b in box]
    padded = np.pad(tensor, pad, constant_values=fill)
    return padded[tuple(slice(8 + a, 8 + a + b) for a, b in zip(at, box, strict=True))]


def tma_examples() -> Iterator[Example]:
    for rank in range(1, 6):
        for name, width in SWIZZLES.items():
            row = width or 32
            shape = [(row + 16) // 2, *SIZES[1:rank]][::-1]
            box = [row // 2, *BOX[1:rank]][::-1]
            inside, over = INSIDE[:rank][::-1], OVERHANGING[:rank][::-1]
            tensor = rng(rank).integers(0, 2**16, shape, dtype=np.uint16)
            tiles = [swizzle(box_at(tensor, at, box).copy().reshape(-1).view(np.uint8), width) for at in (inside, over)]
            wanted = np.concatenate(tiles).view(np.uint32)
            yield Example(f"tma_load_{rank}_{name}", tensor.reshape(-1).view(np.uint32), wanted)

            over = STORED[:rank][::-1]
            tile = rng(10 + rank).integers(0, 2**16, box, dtype=np.uint16)
            image = swizzle(tile.reshape(-1).view(np.uint8), width).view(np.uint32)
            after = put(tensor, tile, over, lambda old, new: new)
            before = tensor.reshape(-1).view(np.uint32)
            yield Example(f"tma_store_{rank}_{name}", image, after.reshape(-1).view(np.uint32), before)

            shape[-1], box[-1] = (row + 16) // 4, row // 4
            over[-1] //= 2
            numbers, added = integers(tuple(shape), 20 + rank), integers(tuple(box), 30 + rank)
            image = swizzle(floats(added).reshape(-1).view(np.uint8), width).view(np.uint32)
            after = put(numbers, 3 * added, over, lambda old, new: old + new)  # three blocks add it
            yield Example(f"tma_reduce_{rank}_{name}", image, floats(after).reshape(-1), floats(numbers).reshape(-1))

    numbers = integers((5, 12), 40)
    tiles = [box_at(floats(numbers), at, [3, 8], fill) for at, fill in (([1, 0], 0), ([3, 4], 0x7FF77FF7))]
    yield Example("tma_fill_nan", floats(numbers).reshape(-1), np.concatenate([t.reshape(-1) for t in tiles]))

    numbers, behind = integers((256,), 41), integers((256,), 42)
    before = np.concatenate([np.zeros(256), behind])
    yield Example(
        "bulk_copies", floats(numbers), floats(np.concatenate([2 * numbers, behind + 2 * numbers])), floats(before)
    )

    v = words(768, 43)
    yield Example("mbarrier_pipeline", v, v.reshape(8, 96)[:, ::-1].reshape(-1))
    yield Example("mbarrier_invalidate", v[:32], np.tile(v[:32], 2))


def put(tensor: np.ndarray, tile: np.ndarray, at: list[int], combine: Callable) -> np.ndarray:
    """The tensor with the tile stored, or added, at a place that may hang over its edges."""
    after = tensor.copy()
    for index in np.ndindex(*tile.shape):
        place = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= p < n for p, n in zip(place, tensor.shape, strict=True)):
            after[place] = combine(after[place], tile[index])
    return after


# ---- wgmma


@dataclass
class Operand:
    """A matrix (mn, k) as it lies in shared memory, and the descriptor's fields."""

    image: np.ndarray
    offset: int
    leading: int
    stride: int


def k_major(m: np.ndarray, width: int, k_step: int) -> Operand:
    """m: (mn, 32 bytes of k). With a swizzle, rows of `width` bytes of which m is the part k_step; the rest is zero."""
    data = np.ascontiguousarray(m).view(np.uint8).reshape(len(m), 32)
    if width == 0:  # two columns of 16 bytes, one after the other
        image = data.reshape(-1, 2, 16).transpose(1, 0, 2).reshape(-1)
        return Operand(image, 0, 16 * len(m), 128)
    rows = np.zeros((len(m), width), np.uint8)
    rows[:, 32 * k_step : 32 * k_step + 32] = data
    return Operand(swizzle(rows.reshape(-1), width), 32 * k_step, 16, 8 * width)


def mn_major(m: np.ndarray, width: int) -> Operand:
    """m: (mn, 16) 16-bit elements. Blocks of `width` bytes along mn, 16 rows (k) each."""
    columns = (width or 16) // 2
    blocks = np.ascontiguousarray(m.T).reshape(16, -1, columns).transpose(1, 0, 2)  # (block, k, columns)
    image = swizzle(np.ascontiguousarray(blocks).view(np.uint8).reshape(-1), width)
    along_mn, along_k = 16 * 2 * columns, 8 * 2 * columns
    return Operand(image, 0, along_k if width == 0 else along_mn, along_mn if width == 0 else along_k)


def operand(m: np.ndarray, major: str, width: int, k_step: int) -> Operand:
    """m is (mn, k). MN-major matrices are padded to whole blocks along mn."""
    if major == "k":
        return k_major(m, width, k_step)
    columns = (width or 16) // 2
    rest = -len(m) % columns
    return mn_major(np.pad(m, ((0, rest), (0, 0))), width)


def wgmma_examples(names: list[str]) -> Iterator[Example]:
    a_words, b_words = 2048, 8192
    for name in names:
        _, columns, type_name, source, a_major, b_major = name.split("_")
        n, k = int(columns), 8 if type_name == "tf32" else 16
        a, b = integers((64, k), n), integers((k, n), n + 1)
        start = np.broadcast_to((np.arange(128) % 7)[:, None], (128, n // 2)).astype(np.float32)
        product = np.concatenate([c_fragments((a @ b)[16 * w : 16 * w + 16]) for w in range(4)])
        wanted = floats(product.view(np.float32) + start).reshape(-1)
        encode = ENCODE[type_name]
        layouts = SWIZZLES if n == 64 else {"b128": 128}
        for (a_swizzle, a_width), (b_swizzle, b_width) in ((x, y) for x in layouts.items() for y in layouts.items()):
            if source == "rs" and a_swizzle != "b128":
                continue
            x = operand(encode(a), a_major, a_width, (a_width // 32 or 1) - 1)
            y = operand(encode(b.T), b_major, b_width, (b_width // 32 or 1) // 2)
            if source == "rs":
                x.image = np.concatenate([a_fragments(encode(a[16 * w : 16 * w + 16])) for w in range(4)]).view(
                    np.uint8
                )
            codes = list(SWIZZLES)
            header = [x.offset, x.leading, x.stride, codes.index(a_swizzle)]
            header += [y.offset, y.leading, y.stride, codes.index(b_swizzle)]
            read = np.zeros(8 + a_words + b_words, np.uint32)
            read[:8] = header
            for at, image in ((8, x.image), (8 + a_words, y.image)):
                image_words = np.ascontiguousarray(image).reshape(-1).view(np.uint32)
                read[at : at + image_words.size] = image_words
            yield Example(name, read, wanted, label=f"-{a_swizzle}-{b_swizzle}")


# ---- clusters


def cluster_examples() -> Iterator[Example]:
    rank = np.array([x % 2 + 2 * y for y in range(2) for x in (0, 1, 0, 1)], np.uint32)
    yield Example("cluster_ranks", np.zeros(0, np.uint32), np.concatenate([rank, np.full(8, 4, np.uint32)]))

    v = words(256, 50).reshape(2, 4, 32)
    read, given = np.roll(v, -1, 1)[:, :, ::-1], 3 * np.roll(v, 2, 1)
    yield Example("distributed_shared_memory", v.reshape(-1), np.stack([read, given], 2).reshape(-1))

    v = words(128, 51).reshape(2, 2, 32)
    yield Example("remote_mbarriers", v.reshape(-1), v[:, ::-1, ::-1].reshape(-1))

    v = words(256, 52)
    yield Example("tma_multicast", v, np.tile(v, 2))

    v = words(32, 53)
    yield Example("programmatic_launch", v, np.concatenate([v + 1, 2 * (v + 1)[::-1]]))
    v = words(384, 54)
    yield Example("setmaxnreg", v, v)


def all_examples(kernels: list[str]) -> list[Example]:
    """One or more for every kernel."""
    examples = [*warp_examples(), *sm80_examples(), *tma_examples(), *cluster_examples()]
    return [*examples, *wgmma_examples([k for k in kernels if k.startswith("wgmma_")])]


def mistake(example: Example, got: np.ndarray) -> str | None:
    """None where the kernel wrote what it had to, else the first difference."""
    if example.relative_error is not None:
        x, y = got.view(np.float32), example.wanted.view(np.float32)
        wrong = ~(np.abs(x - y) <= example.relative_error * (np.abs(y) + 2**-10))
    else:
        x, y = got, np.ascontiguousarray(example.wanted).view(np.uint32).reshape(-1)
        wrong = x != y
    if not wrong.any():
        return None
    i = int(np.argmax(wrong))
    wanted = y.view(np.uint32)[i]
    return f"{wrong.sum()} of {wrong.size} words differ, the first is word {i}: {got[i]:#x}, wanted {wanted:#x}"
