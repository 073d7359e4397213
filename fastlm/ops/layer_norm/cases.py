"""Cases of layer_norm and rms_norm, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.case import Case, Maker


def eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, residual=None):
    h = x if residual is None else x + residual
    b = None if bias is None else bias.to(h.dtype)
    y = torch.nn.functional.layer_norm(h, (h.shape[-1],), weight.to(h.dtype), b, eps).to(x.dtype)
    return y if residual is None else (y, h)


def eager_rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual=None):
    h = x if residual is None else x + residual
    y = torch.nn.functional.rms_norm(h, (h.shape[-1],), weight.to(h.dtype), eps).to(x.dtype)
    return y if residual is None else (y, h)


def _build(shape, bias=False, residual=False, wide_residual=False, wide_weight=False, scale=1.0, shift=0.0, layout=""):
    def build(make: Maker) -> dict:
        width = shape[-1]
        x = make.randn(*shape, scale=scale, shift=shift)
        if layout == "sliced":  # rows further apart than they are long, and not 16-byte aligned
            x = make.randn(*shape[:-1], 2 * width + 1, scale=scale, shift=shift)[..., 1 : width + 1]
        elif layout == "transposed":
            x = make.randn(width, *shape[:-1], scale=scale, shift=shift).movedim(0, -1)
        wide = torch.float32 if make.dtype != torch.float64 else torch.float64
        w_dtype = wide if wide_weight else make.dtype
        arguments = {"x": x, "weight": make.randn(width, scale=0.2, shift=1.0, dtype=w_dtype)}
        if bias:
            arguments["bias"] = make.randn(width, scale=0.2, dtype=w_dtype)
        if residual:
            arguments["residual"] = make.randn(*shape, dtype=wide if wide_residual else make.dtype)
        return arguments

    return build


def _layer_norm(name: str, shape: tuple[int, ...], bench: bool = False, **options) -> Case:
    traits = frozenset({"scale"} if options.get("scale", 1.0) != 1.0 else ())
    return Case("layer_norm", name, _build(shape, **options), eager_layer_norm, bench, traits)


def _rms_norm(name: str, shape: tuple[int, ...], bench: bool = False, **options) -> Case:
    return Case("rms_norm", name, _build(shape, **options), eager_rms_norm, bench)


CASES = [
    _layer_norm("plain", (6, 64)),
    _layer_norm("bias", (2, 5, 96), bias=True),
    _layer_norm("residual", (2, 7, 128), bias=True, residual=True),
    _layer_norm("residual-no-bias", (9, 80), residual=True),
    _layer_norm("float32-residual", (5, 160), bias=True, residual=True, wide_residual=True),
    _layer_norm("float32-weights", (5, 72), bias=True, wide_weight=True),
    _layer_norm("odd-width", (3, 77), bias=True, residual=True),
    _layer_norm("width-1", (4, 1), bias=True),
    _layer_norm("one-row", (768,), bias=True),
    _layer_norm("gpt2", (33, 768), bias=True, residual=True),
    _layer_norm("many-rows", (257, 40), bias=True),
    _layer_norm("wide", (2, 5000), bias=True, residual=True),
    _layer_norm("wider-than-registers", (3, 10001), bias=True, residual=True),
    _layer_norm("empty-batch", (0, 64), bias=True, residual=True),
    _layer_norm("huge", (4, 64), scale=1e4, bias=True),
    _layer_norm("tiny", (4, 64), scale=1e-4, bias=True),
    _layer_norm("large-mean", (4, 256), scale=0.5, shift=40.0, bias=True),
    _layer_norm("sliced", (5, 48), bias=True, residual=True, layout="sliced"),
    _layer_norm("transposed", (3, 5, 48), bias=True, layout="transposed"),
    _rms_norm("plain", (6, 64)),
    _rms_norm("residual", (2, 7, 128), residual=True),
    _rms_norm("float32-residual", (5, 160), residual=True, wide_residual=True),
    _rms_norm("odd-width", (3, 77), residual=True),
    _rms_norm("llama", (17, 2048), residual=True),
    _rms_norm("wider-than-registers", (19, 8200), residual=True, wide_residual=True),
    _rms_norm("65536", (65536,)),
    _rms_norm("empty-batch", (2, 0, 64)),
    _rms_norm("sliced", (5, 48), residual=True, layout="sliced"),
    _layer_norm("1024x768-residual", (1024, 768), bench=True, bias=True, residual=True),
    _layer_norm("1024x768", (1024, 768), bench=True, bias=True),
    _layer_norm("4096x1600-residual", (4096, 1600), bench=True, bias=True, residual=True),
    _rms_norm("1024x2048-residual", (1024, 2048), bench=True, residual=True),
]
