"""Cases of attention and attention_qkvpacked, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import philox
from fastlm.ops.case import Case, Maker


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    return_lse: bool = False,
):
    """Explicit softmax over all scores."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    batch, heads, length, width = q.shape
    columns = k.shape[2]
    scores = (q @ k.transpose(-2, -1)) * (width**-0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(length, device=q.device)[:, None] + columns - length
    j = torch.arange(columns, device=q.device)
    if alibi_slopes is not None:
        scores = scores - (alibi_slopes.detach()[..., None, None] * (i - j).abs()).to(scores.dtype)
    hidden = _hidden(i, j, causal, window, cu_seqlens)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = torch.softmax(scores, -1)
    if hidden is not None:
        weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)  # softmax gave NaN
    if dropout_p > 0:
        planes = torch.arange(batch * heads, device=q.device).view(batch, heads)
        state = philox.draw_state(q.device)
        kept = philox.keep_mask(state, dropout_p, planes, range(length), range(columns))
        weights = weights * kept / (1 - dropout_p)
    out = (weights @ v).transpose(1, 2)
    if not return_lse:
        return out
    lse = torch.logsumexp(scores, -1)
    return out, lse if lse.dtype == torch.float64 else lse.float()


def _hidden(i: Tensor, j: Tensor, causal: bool, window, cu_seqlens: Tensor | None) -> Tensor | None:
    """True where row i (moved to the column it is aligned with) does not see column j."""
    left, right = (-1 if side is None else side for side in window or (-1, -1))
    masks = []
    if causal or right >= 0:
        masks.append(j > i + (0 if causal else right))
    if left >= 0:
        masks.append(j < i - left)
    if cu_seqlens is not None:
        documents = torch.bucketize(j, cu_seqlens, right=True)
        masks.append(documents[:, None] != documents)
    hidden = None
    for mask in masks:
        hidden = mask if hidden is None else hidden | mask
    return hidden


def _build(
    batch=2,
    length=33,
    columns=None,
    heads=2,
    kv_heads=None,
    width=64,
    alibi="",
    lengths=None,
    layout="",
    size=1.0,
    **options,
):
    def build(make: Maker) -> dict:
        s, g = length if columns is None else columns, kv_heads or heads
        rows = sum(lengths) if lengths is not None else length
        if lengths is not None:
            s = rows
        if layout == "packed":  # slices of one projection, as a model has them
            q, k, v = make.randn(batch, rows, 3, heads, width, scale=size).unbind(2)
        elif layout == "heads-first":
            q = make.randn(batch, heads, rows, width, scale=size).transpose(1, 2)
            k, v = (make.randn(batch, g, s, width, scale=size).transpose(1, 2) for _ in range(2))
        elif layout == "odd-strides":  # last dimension not contiguous, base not aligned
            q = make.randn(batch, rows, heads, 2 * width + 1, scale=size)[..., 1::2]
            k, v = (make.randn(batch, s, g, width + 1, scale=size)[..., 1:] for _ in range(2))
        else:
            q = make.randn(batch, rows, heads, width, scale=size)
            k, v = (make.randn(batch, s, g, width, scale=size) for _ in range(2))
        arguments = {"q": q, "k": k, "v": v, **options}
        if alibi:
            shape = (batch, heads) if alibi == "batch" else (heads,)
            wide = torch.float64 if make.dtype == torch.float64 else torch.float32
            arguments["alibi_slopes"] = make.randn(*shape, scale=0.1, shift=0.3, dtype=wide)
        if lengths is not None:
            ends = torch.tensor([0, *lengths]).cumsum(0)
            arguments["cu_seqlens"] = ends.to(make.device, torch.int32)
        return arguments

    return build


def slices(qkv: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, ...]:
    """q, k and v of a packed projection, (B, T, heads, D)."""
    return qkv.unflatten(2, (n_head + 2 * n_kv_head, -1)).split((n_head, n_kv_head, n_kv_head), 2)


def eager_attention_qkvpacked(qkv: Tensor, n_head: int, n_kv_head: int, **options) -> Tensor:
    return eager_attention(*slices(qkv, n_head, n_kv_head), **options)


def _build_qkvpacked(layout="", **options):
    build = _build(**options)

    def packed(make: Maker) -> dict:
        arguments = build(make)
        q, k, v = (arguments.pop(name) for name in "qkv")
        qkv = torch.cat((q, k, v), 2).flatten(2)
        if layout == "length-first":
            qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "slice":  # of something wider, whose base and rows are not aligned
            qkv = torch.nn.functional.pad(qkv, (1, 2))[..., 1:-2]
        elif layout == "odd-strides":  # last dimension not contiguous
            qkv = torch.stack((qkv, qkv), -1)[..., 1]
        return {"qkv": qkv, "n_head": q.shape[2], "n_kv_head": k.shape[2], **arguments}

    return packed


def _case(name: str, *traits: str, bench: bool = False, **options) -> Case:
    return Case("attention", name, _build(**options), eager_attention, bench, frozenset(traits))


def _qkvpacked(name: str, *, bench: bool = False, **options) -> Case:
    return Case("attention_qkvpacked", name, _build_qkvpacked(**options), eager_attention_qkvpacked, bench)


CASES = [
    _case("plain"),
    _case("causal", causal=True),
    _case("long", batch=1, length=300, causal=True, heads=1),
    _case("long-full", batch=1, length=257, columns=391, heads=1, width=32),
    _case("more-columns", length=19, columns=70),
    _case("more-columns-causal", length=19, columns=70, causal=True),
    _case("more-rows", length=70, columns=19),
    _case("more-rows-causal", length=70, columns=19, causal=True),  # the first 51 rows see nothing
    _case("no-columns", "infinite", length=5, columns=0, return_lse=True),
    _case("empty-batch", batch=0, causal=True),
    _case("no-rows", length=0, columns=8, causal=True),
    _case("decode", length=1, columns=77, causal=True),
    _case("decode-gqa", batch=3, length=1, columns=290, heads=8, kv_heads=2, causal=True),
    _case("decode-long", batch=1, length=1, columns=1500, heads=2, width=32, causal=True, return_lse=True),
    _case("decode-few", batch=1, length=3, columns=130, heads=4, kv_heads=1, causal=True),
    _case("gqa", heads=6, kv_heads=2, causal=True),
    _case("mqa", heads=5, kv_heads=1, causal=True, length=40),
    *(
        _case(f"width-{d}", length=21, columns=37, heads=1, width=d, causal=True)
        for d in (1, 8, 20, 40, 80, 96, 128, 256)
    ),
    _case("width-77", length=18, heads=2, width=77),
    _case("scale", scale=0.3, causal=True),
    _case("negative-scale", scale=-0.2, causal=True),
    _case("window", length=90, window=(16, 5)),
    _case("window-left", length=140, window=(20, None), causal=True),
    _case("window-right", length=50, columns=60, window=(-1, 7)),
    _case("window-1", length=40, window=(1, 0)),
    _case("window-more-columns", length=30, columns=150, window=(40, 3)),
    _case("window-more-rows", "infinite", length=150, columns=30, window=(9, 9), return_lse=True),
    _case("softcap", softcap=3.0, causal=True),
    _case("softcap-gradients-of-lse", softcap=2.0, return_lse=True, length=20),
    _case("alibi", alibi="heads", causal=True, heads=3),
    _case("alibi-batch-both-sides", alibi="batch", length=40, columns=55),
    _case("lse", return_lse=True, causal=True),
    _case("lse-nothing-to-attend", "infinite", length=40, columns=9, return_lse=True, causal=True),
    _case("packed", batch=1, lengths=(13, 1, 40, 26), causal=True),
    _case("packed-full", batch=1, lengths=(70, 30)),
    _case("packed-empty-sequences", batch=1, lengths=(0, 17, 0, 0, 25, 0), causal=True, heads=4, kv_heads=2),
    _case("packed-window-alibi", batch=1, lengths=(50, 31), window=(12, 4), alibi="heads", return_lse=True),
    _case("packed-max", batch=1, lengths=(20, 31), max_seqlen=31, causal=True),
    _case("dropout", dropout_p=0.25, causal=True),
    _case("dropout-gqa-full", dropout_p=0.5, length=45, columns=130, heads=4, kv_heads=2, return_lse=True),
    _case("dropout-packed", dropout_p=0.1, batch=1, lengths=(37, 22, 19), causal=True),
    _case("dropout-window", dropout_p=0.1, length=100, window=(11, 30)),
    _case("slices-of-one-projection", layout="packed", causal=True, heads=3),
    _case("heads-first", layout="heads-first", length=20, columns=31, heads=4, kv_heads=2),
    _case("odd-strides", layout="odd-strides", causal=True, width=24),
    _case("odd-strides-gqa", layout="odd-strides", columns=50, heads=4, kv_heads=2, width=16),
    _case("huge", "scale", size=30.0, causal=True, scale=0.02, length=100),
    _case("tiny", "scale", size=1e-3, causal=True, scale=1e5),
    _case(
        "everything",
        length=60,
        columns=85,
        heads=4,
        kv_heads=2,
        width=40,
        window=(30, 12),
        softcap=5.0,
        alibi="batch",
        dropout_p=0.2,
        scale=0.2,
        return_lse=True,
    ),
    _case(
        "everything-packed",
        batch=1,
        lengths=(31, 0, 44, 2),
        heads=4,
        kv_heads=1,
        width=80,
        causal=True,
        window=(21, None),
        softcap=4.0,
        alibi="heads",
        dropout_p=0.2,
        return_lse=True,
    ),
    _case("gpt2-4x256", bench=True, batch=4, length=256, heads=12, causal=True),
    _case("gpt2-1x1024", bench=True, batch=1, length=1024, heads=12, causal=True),
    _case("gpt2-4x256-projection", bench=True, batch=4, length=256, heads=12, causal=True, layout="packed"),
    _case("gpt2-decode", bench=True, batch=1, length=1, columns=512, heads=12, causal=True),
    _case("llama-1x512", bench=True, batch=1, length=512, heads=16, kv_heads=4, width=128, causal=True),
    _case("llama-decode", bench=True, batch=1, length=1, columns=2048, heads=32, kv_heads=8, width=128, causal=True),
    _case("packed-4x256", bench=True, batch=1, lengths=(100, 412, 256, 256), heads=12, causal=True),
    _qkvpacked("causal", causal=True),
    _qkvpacked("gqa", heads=6, kv_heads=2, causal=True),
    _qkvpacked("mqa-full", heads=3, kv_heads=1, length=40, width=128),
    _qkvpacked("long", batch=1, length=300, heads=1, causal=True),
    _qkvpacked("width-20", heads=3, width=20, causal=True),
    _qkvpacked("width-77", length=18, width=77),
    _qkvpacked("width-256", length=21, kv_heads=1, width=256, causal=True),
    _qkvpacked("empty-batch", batch=0, causal=True),
    _qkvpacked("no-rows", length=0),
    _qkvpacked("window", heads=4, kv_heads=2, length=90, window=(16, 5)),
    _qkvpacked("dropout", length=45, heads=4, kv_heads=2, dropout_p=0.25, causal=True),
    _qkvpacked("sequences", batch=1, lengths=(13, 0, 40, 26), heads=4, kv_heads=2, causal=True),
    _qkvpacked("length-first", layout="length-first", causal=True, width=24),
    _qkvpacked("slice", layout="slice", heads=4, kv_heads=2, causal=True),
    _qkvpacked("odd-strides", layout="odd-strides", causal=True, width=24),
    _qkvpacked(
        "every-option",
        batch=1,
        lengths=(31, 0, 44, 2),
        max_seqlen=44,
        heads=4,
        kv_heads=1,
        width=80,
        causal=True,
        window=(21, None),
        softcap=4.0,
        alibi="heads",
        dropout_p=0.2,
        scale=0.2,
    ),
    _qkvpacked("gpt2-4x256", bench=True, batch=4, length=256, heads=12, causal=True),
]
