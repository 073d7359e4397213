"""Cases of rotary, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.case import Case, Maker


def eager_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """As in transformers: x cos + rotate(x) sin, with every angle written twice."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    twice = (lambda t: t.repeat_interleave(2, -1)) if interleaved else (lambda t: torch.cat((t, t), -1))
    cos, sin = (twice(t).unsqueeze(-2) for t in (cos, sin))  # ([B,] T, 1, R)

    def rotate(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    def turn(x: Tensor) -> Tensor:
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat(((turned * cos + rotate(turned) * sin).to(x.dtype), rest), -1)

    return turn(q), turn(k)


def _build(batch, length, heads, kv_heads, width, turned=None, rows="", layout="", **options):
    """rows: "" angles of the tokens, "each" of each batch entry, "positions" or "each-positions": rows of a table."""

    def build(make: Maker) -> dict:
        wide = torch.float64 if make.dtype == torch.float64 else torch.float32
        if layout == "packed":  # slices of one projection
            heads_of_all = make.randn(batch, length, heads + 2 * kv_heads, width)
            q, k, _ = heads_of_all.tensor_split((heads, heads + kv_heads), dim=2)
        elif layout == "transposed":
            q = make.randn(batch, heads, length, width).transpose(1, 2)
            k = make.randn(batch, kv_heads, width, length).permute(0, 3, 1, 2)
        else:
            q, k = make.randn(batch, length, heads, width), make.randn(batch, length, kv_heads, width)
        per_row = (batch,) if rows.startswith("each") else ()
        table = (length + 5,) if rows.endswith("positions") else (*per_row, length)
        angles = make.randn(*table, (width if turned is None else turned) // 2, dtype=wide, scale=3.0)
        arguments = {"q": q, "k": k, "cos": angles.cos(), "sin": angles.sin(), **options}
        if rows.endswith("positions"):
            arguments["positions"] = make.integers(0, length + 5, *per_row, length)
        return arguments

    return build


def _case(name: str, *sizes: int, bench: bool = False, **options) -> Case:
    return Case("rotary", name, _build(*sizes, **options), eager_rotary, bench)


CASES = [
    _case("plain", 2, 5, 3, 3, 16),
    _case("each-row", 2, 7, 4, 2, 32, rows="each", layout="packed"),
    _case("positions", 2, 9, 4, 1, 64, rows="positions", layout="packed"),
    _case("each-positions", 3, 4, 2, 2, 48, rows="each-positions", interleaved=True),
    _case("interleaved", 2, 6, 3, 1, 64, layout="packed", interleaved=True),
    _case("partial", 2, 5, 2, 2, 80, turned=32, layout="packed"),
    _case("partial-interleaved", 1, 5, 2, 1, 64, turned=24, interleaved=True),
    _case("odd", 2, 5, 3, 1, 11, turned=6),
    _case("odd-interleaved", 1, 3, 2, 1, 10, interleaved=True),
    _case("transposed", 2, 6, 2, 2, 32, layout="transposed"),
    _case("llama", 1, 17, 8, 2, 128, layout="packed"),
    _case("empty", 0, 4, 2, 2, 16),
    _case("gpt-1x1024", 1, 1024, 12, 12, 64, bench=True, layout="packed"),
    _case("llama-1x4096", 1, 4096, 32, 8, 64, bench=True, layout="packed"),
]
