"""Cases of decode_attention. It has no backward pass: test_decode_attention.py iterates the small ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.case import Case, Maker


def eager_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Explicit softmax, sequence by sequence."""
    rows, heads, width = q.shape[1:]
    group, results = heads // k_cache.shape[2], []
    for b, n in enumerate(cache_lengths.tolist()):
        if block_table is None:
            k, v = k_cache[b, :n], v_cache[b, :n]
        else:
            k, v = (t[block_table[b].clamp(0, len(t) - 1)].flatten(0, 1)[:n] for t in (k_cache, v_cache))
        k, v = (t.repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))  # (H, n, D)
        scores = (q[b].transpose(0, 1) @ k.mT) * (width**-0.5 if scale is None else scale)  # (H, T, n)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(n - rows, n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        if alibi_slopes is not None:
            slopes = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[b]
            scores = scores - (slopes[:, None, None] * distance.abs()).to(scores.dtype)
        hidden = distance < 0 if window is None else (distance < 0) | (distance > window)
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        results.append((weights.masked_fill(hidden.all(-1, keepdim=True), 0.0) @ v).transpose(0, 1))
    return torch.stack(results) if results else torch.zeros_like(q)


def _build(lengths, rows, heads, kv_heads, width, capacity, page=0, alibi=0, layout="", **options):
    """page: tokens of a page, 0: none. alibi: the dimensions of the slopes."""

    def build(make: Maker) -> dict:
        batch = len(lengths)
        arguments = {"q": make.randn(batch, rows, heads, width)}
        shape = (batch, capacity, kv_heads, width)
        if page:
            per_row = -(-capacity // page)
            order = torch.randperm(batch * per_row + 3, generator=make.generator)[: batch * per_row]
            arguments["block_table"] = order.view(batch, per_row).to(make.device, torch.int32)
            shape = (batch * per_row + 3, page, kv_heads, width)
        if layout == "sliced":  # at odd addresses
            caches = [make.randn(*shape[:3], width + 3)[..., 1 : width + 1] for _ in range(2)]
        elif layout == "transposed":
            caches = [make.randn(shape[0], shape[2], shape[1], width).transpose(1, 2) for _ in range(2)]
        else:
            caches = [make.randn(*shape) for _ in range(2)]
        arguments["k_cache"], arguments["v_cache"] = caches
        arguments["cache_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=make.device)
        if alibi:
            wide = torch.float64 if make.dtype == torch.float64 else torch.float32
            arguments["alibi_slopes"] = make.randn(*(batch, heads)[2 - alibi :], dtype=wide).abs()
        return {**arguments, **options}

    return build


def _case(name: str, *sizes, bench: bool = False, **options) -> Case:
    build = _build(*sizes, **options)
    return Case("decode_attention", name, build, eager_decode_attention, bench, frozenset({"forward"}))


SMALL = [
    _case("one", (40,), 1, 2, 2, 64, 64),
    _case("ragged", (5, 300, 128, 1), 1, 4, 2, 32, 310),
    _case("paged", (5, 130, 17), 1, 4, 4, 64, 160, page=16),
    _case("pages-of-odd-size", (150, 33), 2, 4, 1, 40, 160, page=7),
    _case("several-rows", (9, 200), 5, 6, 2, 48, 256),
    _case("shorter-than-the-rows", (2, 0, 4), 4, 2, 1, 16, 8),
    _case("window", (290, 3), 3, 2, 2, 64, 300, window=20),
    _case("window-of-none", (150,), 2, 2, 1, 16, 200, window=0),
    _case("softcap-alibi", (140, 60), 2, 4, 2, 80, 200, softcap=3.0, alibi=1),
    _case("alibi-of-each", (70, 20), 1, 4, 4, 32, 80, alibi=2, scale=0.3),
    _case("wide", (135,), 1, 2, 1, 256, 140),
    _case("odd-width", (50, 131), 1, 3, 1, 13, 140),
    _case("sliced", (50, 90), 1, 2, 2, 64, 100, layout="sliced"),
    _case("transposed", (50, 90), 1, 2, 2, 64, 100, layout="transposed"),
    _case("sixteen-rows", (140,), 16, 4, 1, 32, 150),
    _case("empty-batch", (), 1, 2, 2, 16, 20),
]
CASES = [
    _case("1x1024", (1024,), 1, 12, 12, 64, 1024, bench=True),
    _case("8-ragged-4096", (300, 4096, 1000, 77, 2048, 3000, 900, 4000), 1, 32, 8, 128, 4096, bench=True),
]
