"""Cases of linear_cross_entropy, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops.case import Case, Maker


def eager_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = F.linear(x, weight).to(wide)  # (..., V)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    flat, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    loss = F.cross_entropy(
        flat, labels, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss:
        squares = z_loss * flat.logsumexp(-1).square().masked_fill(labels == ignore_index, 0)
        if reduction == "mean":
            squares = squares.sum() / (labels != ignore_index).sum()
        loss = loss + (squares.sum() if reduction == "sum" else squares)
    return loss.view(targets.shape) if reduction == "none" else loss


def _case(
    name: str,
    shape: tuple[int, ...],
    vocab: int,
    ignored: str = "",
    layout: str = "",
    scale: float = 1.0,
    bench: bool = False,
    traits: tuple[str, ...] = (),
    **options: Any,
) -> Case:
    """`ignored`: "some" of the targets or "all"; `scale`: that of the logits."""

    def build(make: Maker) -> dict:
        width = shape[-1]
        if layout == "sliced":  # rows further apart than they are long, and not 16-byte aligned
            x = make.randn(*shape[:-1], 2 * width + 1)[..., 1 : width + 1]
            weight = make.randn(vocab, 2 * width + 1, scale=scale * width**-0.5)[:, 1 : width + 1]
        elif layout == "transposed":
            x = make.randn(width, *shape[:-1]).movedim(0, -1)
            weight = make.randn(width, vocab, scale=scale * width**-0.5).T
        else:
            x, weight = make.randn(*shape), make.randn(vocab, width, scale=scale * width**-0.5)
        targets = make.integers(0, vocab, *shape[:-1])
        if ignored:
            every = 1 if ignored == "all" else 3
            targets.view(-1)[::every] = options.get("ignore_index", -100)
        return {"x": x, "weight": weight, "targets": targets, **options}

    return Case("linear_cross_entropy", name, build, eager_linear_cross_entropy, bench, frozenset(traits))


_EVERYTHING: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}

CASES = [
    _case("plain", (3, 7, 32), 65),
    _case("sum", (3, 7, 32), 65, reduction="sum"),
    _case("none", (3, 7, 32), 65, reduction="none"),
    _case("ignored", (3, 7, 32), 65, "some"),
    _case("ignored-inside-the-vocabulary", (3, 7, 32), 65, "some", ignore_index=3),
    _case("ignored-none", (3, 7, 32), 65, "some", reduction="none"),
    _case("all-ignored", (4, 16), 33, "all", reduction="sum"),
    _case("label-smoothing", (19, 24), 50, "some", label_smoothing=0.1),
    _case("z-loss", (19, 24), 50, "some", z_loss=1e-2),
    _case("softcap", (19, 24), 50, softcap=2.0),
    _case("everything", (19, 24), 77, "some", **_EVERYTHING),
    _case("everything-sum", (19, 24), 77, "some", reduction="sum", **_EVERYTHING),
    _case("everything-none", (19, 24), 77, "some", reduction="none", **_EVERYTHING),
    _case("one-row", (40,), 131),
    _case("one-class", (5, 16), 1),
    _case("odd", (13, 29), 1003),
    _case("large-vocabulary", (33, 8), 20011, "some", traits=("large",)),
    _case("many-rows", (4500, 8), 11, "some", traits=("large",)),
    _case("empty-batch", (2, 0, 16), 33, reduction="sum"),
    _case("empty-batch-none", (0, 16), 33, reduction="none"),
    _case("sliced", (6, 40), 99, layout="sliced"),
    _case("transposed", (3, 5, 40), 99, layout="transposed"),
    _case("confident", (9, 40), 99, scale=30.0),
    _case("tiny-logits", (9, 40), 99, scale=1e-3),
    _case("head-1024x768x50304", (1024, 768), 50304, bench=True),
    _case("head-3072x384x65", (3072, 384), 65, bench=True),
]
