"""Cases of embedding, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.case import Case, Maker


def eager_embedding(ids: Tensor, weight: Tensor, *, padding_idx: int | None = None) -> Tensor:
    return torch.nn.functional.embedding(ids, weight, padding_idx)


def _build(shape, vocabulary, cols, dtype=torch.int64, common=0.0, layout="", **options):
    """common: the share of ids that are one and the same."""

    def build(make: Maker) -> dict:
        ids = make.integers(0, vocabulary, *shape).to(dtype)
        if common:
            ids = torch.where(make.integers(0, 1000, *shape) < 1000 * common, 1, ids).to(dtype)
        weight = make.randn(vocabulary, cols)
        if layout == "sliced":
            weight = make.randn(vocabulary, 2 * cols + 1)[:, 1 : cols + 1]
            ids = ids.mT.contiguous().mT
        return {"ids": ids, "weight": weight, **options}

    return build


def _case(name: str, *sizes, bench: bool = False, **options) -> Case:
    traits = frozenset({"padding"} if "padding_idx" in options else ())
    return Case("embedding", name, _build(*sizes, **options), eager_embedding, bench, traits)


CASES = [
    _case("plain", (2, 9), 20, 64),
    _case("int32", (3, 5), 17, 40, dtype=torch.int32),
    _case("padding", (4, 11), 7, 32, padding_idx=3),
    _case("padding-from-the-end", (4, 11), 7, 32, padding_idx=-1),
    _case("common", (3, 120), 50, 48, common=0.6),  # one id fills more than a tile and more than a run
    _case("one-id", (300,), 1, 24),
    _case("odd-width", (2, 40), 9, 77, common=0.8),
    _case("wide", (2, 3), 5, 1100),
    _case("sliced", (3, 7), 11, 24, layout="sliced"),
    _case("scalar", (), 5, 16),
    _case("empty", (0, 4), 5, 16),
    _case("gpt2-1024", (1, 1024), 50257, 768, bench=True, common=0.05),
    _case("gpt2-8192", (8, 1024), 50257, 768, bench=True, common=0.05),
]
