"""Cases of linear, for tests and benchmarks."""

from __future__ import annotations

import torch.nn.functional as F

from fastlm.ops.case import Case, Maker


def _linear(
    name: str, shape: tuple[int, ...], width: int, bias: bool = True, layout: str = "", bench: bool = False
) -> Case:
    def build(make: Maker) -> dict:
        depth = shape[-1]
        if layout == "sliced":  # rows further apart than they are long, and not 16-byte aligned
            x = make.randn(*shape[:-1], 2 * depth + 1)[..., 1 : depth + 1]
            weight = make.randn(width, 2 * depth + 1, scale=depth**-0.5)[:, 1 : depth + 1]
        elif layout == "transposed":
            x = make.randn(depth, *shape[:-1]).movedim(0, -1)
            weight = make.randn(depth, width, scale=depth**-0.5).T
        else:
            x, weight = make.randn(*shape), make.randn(width, depth, scale=depth**-0.5)
        return {"x": x, "weight": weight, "bias": make.randn(width) if bias else None}

    return Case("linear", name, build, F.linear, bench)


CASES = [
    *(_linear(f"rows-{n}", (n, 96), 40) for n in (1, 2, 3, 4, 7, 16, 17, 33)),
    _linear("no-bias", (3, 64), 32, bias=False),
    _linear("odd", (5, 37), 19),
    _linear("one-column", (2, 3, 50), 1),
    _linear("depth-1", (6, 1), 9),
    _linear("no-rows", (0, 16), 8),
    _linear("vector", (48,), 24),
    _linear("batch", (2, 30, 64), 48, bias=False),
    _linear("sliced-few", (3, 40), 24, layout="sliced"),
    _linear("sliced-many", (40, 24), 24, layout="sliced"),
    _linear("transposed-few", (4, 40), 24, layout="transposed"),
    _linear("transposed-many", (40, 24), 24, layout="transposed"),
    _linear("wide", (2, 256), 600),
    _linear("1x768-3072", (1, 768), 3072, bench=True),
    _linear("1x768-50304", (1, 768), 50304, bias=False, bench=True),
    _linear("8x768-3072", (8, 768), 3072, bench=True),
    _linear("32x768-3072", (32, 768), 3072, bench=True),
    _linear("128x3072-768", (128, 3072), 768, bench=True),
    _linear("1024x768-2304", (1024, 768), 2304, bench=True),
]
