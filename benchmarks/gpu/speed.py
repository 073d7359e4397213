"""The parts that measure: the machine's ceilings, every op, the training step of GPT-2 124M, decoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.proof import gpu
from benchmarks.gpu.rates import Ceilings, Cost, cost_of, kernel_seconds, measure_ceilings, rate
from benchmarks.gpu.record import Record
from fastlm.bench import ops, report, timing
from fastlm.bench.ops import call_of
from fastlm.bench.peers import Peer, peers_of
from fastlm.bench.steps import Size, Trainer, compare_generation
from fastlm.bench.timing import BASELINE, Comparison, Result, reason_of
from fastlm.models.gpt import GPTConfig
from fastlm.ops.case import Case, Maker, all_cases
from fastlm.training.graph import RecordedPass

SDPA = {"cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
PRODUCT_ALONE = "the product alone"  # of linear_act, by torch: no bias, no activation
RECORDED = "fastlm recorded"
COMPILE, MAX_AUTOTUNE = "torch.compile", "torch.compile max-autotune"
GPT2 = Size("gpt2", GPTConfig.preset("gpt2", vocab_size=50304), 16, 1024)
NAME = "ceilings"


def ceilings(record: Record, device: str = "cuda", **sizes: int) -> None:
    """What the other parts are compared to."""
    if device == "cuda":
        gpu()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = measure_ceilings(device, dtype, **sizes)
    table = record.table("Measured ceilings", ("what", "rate"))
    table.add(f"matrix product, {str(dtype).removeprefix('torch.')}", f"{found.product / 1e12:,.1f} TFLOP/s")
    table.add("copy, read and written", f"{found.copy / 1e9:,.0f} GB/s")
    record.content["ceilings"] = {"product": found.product, "copy": found.copy}
    record.save()


def known_ceilings(folder: Path) -> Ceilings | None:
    """Those that the part `ceilings` has left in this run."""
    path = folder / f"{NAME}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return Ceilings(**content["ceilings"]) if "ceilings" in content else None


def peers(case: Case, arguments: dict[str, Any]) -> list[Peer]:
    """Those of `fastlm bench`, with SDPA once for each of its backends, and torch.compile with max-autotune."""
    found: list[Peer] = []
    for peer in peers_of(case, arguments):
        if peer.name == "sdpa":
            found += [replace(peer, name=f"sdpa {name}", context=_forced(name)) for name in SDPA]
        elif peer.name == "torch.compile":
            compiled = torch.compile(case.eager, mode="max-autotune-no-cudagraphs")
            found.append(Peer(MAX_AUTOTUNE, compiled))
        else:
            found.append(peer)
    if case.op == "linear_act":
        found.append(Peer(PRODUCT_ALONE, lambda x, weight, **_: nn.functional.linear(x, weight)))
    return found


def _forced(name: str) -> Any:
    def context() -> AbstractContextManager[Any]:
        return sdpa_kernel(getattr(SDPBackend, SDPA[name]))

    return context


HEADER = ("work", "mode", "peer", "a call", "over eager", "its kernels", "their rate", "of the ceiling", "error")


def every_op(
    record: Record,
    device: str = "cuda",
    known: Ceilings | None = None,
    cases: Sequence[Case] | None = None,
    seconds: float = 0.5,
    skip: set[str] | None = None,
) -> None:
    """The benchmark cases of every op, those with a goal and the first of each op before the others. torch.compile
    comes last, because it may compile for longer than the part lasts."""
    if device == "cuda":
        gpu()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    table = record.table("Ops", HEADER)
    without = skip or set()
    first = list(cases) if cases is not None else [*targets(), *ops.cases()]
    others = [] if cases is not None else [c for c in all_cases(bench=True) if c not in first]
    for case in [*first, *others]:
        _one_case(record, table, case, dtype, device, known, seconds, without | {MAX_AUTOTUNE})
    if MAX_AUTOTUNE in without:
        return
    for case in first:
        if "in-place" not in case.traits:
            rest = {p.name for p in peers(case, case.build(Maker(dtype, device)))} - _COMPILED
            _one_case(record, table, case, dtype, device, known, seconds, without | rest)


_COMPILED = {BASELINE, MAX_AUTOTUNE, "fastlm cuda"}  # who takes part in the second round


def targets() -> list[Case]:
    """The shapes for which docs/kernels.md has predictions and the project has goals."""

    def attention(make: Maker) -> dict[str, Any]:
        return {**{name: make.randn(1, 8192, 16, 128) for name in "qkv"}, "causal": True}

    def linear(make: Maker) -> dict[str, Any]:
        x, weight, bias = make.randn(16384, 768), make.randn(3072, 768, scale=0.03), make.randn(3072)
        return {"x": x, "weight": weight, "bias": bias, "activation": "gelu_tanh"}

    def layer_norm(make: Maker) -> dict[str, Any]:
        return {"x": make.randn(16384, 768), "weight": make.randn(768), "bias": make.randn(768)}

    builders = {"attention": ("1x8192x16x128", attention), "linear_act": ("16384x768-3072", linear)}
    builders["layer_norm"] = ("16384x768", layer_norm)
    eager = {case.op: case.eager for case in all_cases(bench=True)}
    return [Case(op, name, build, eager[op], bench=True) for op, (name, build) in builders.items()]


def _one_case(
    record: Record,
    table: Any,
    case: Case,
    dtype: torch.dtype,
    device: str,
    known: Ceilings | None,
    seconds: float,
    skip: set[str],
) -> None:
    try:
        for comparison in ops.compare(case, dtype, device, 9, seconds, skip, peers):
            arguments = case.build(Maker(dtype, device))
            cost = cost_of(case, arguments, comparison.mode)
            measured = {r.peer for r in comparison.results if r.median is not None}
            alone = kernel_seconds(
                {
                    peer.name: call_of(peer, arguments, comparison.mode)
                    for peer in peers(case, arguments)
                    if peer.name in measured - {MAX_AUTOTUNE}  # it would compile anew
                }
            )
            _add(record, table, comparison, cost, known, alone)
    except Exception as error:
        record.note(f"{case}: {reason_of(error)}")


def _add(
    record: Record,
    table: Any,
    comparison: Comparison,
    cost: Cost,
    known: Ceilings | None,
    alone: dict[str, float],
) -> None:
    """A row for each peer that was measured, a note for each that was not. `alone`: the seconds of the kernels."""
    for result in comparison.results:
        if result.median is None:
            if not (result.reason or "").startswith("plain PyTorch"):
                record.note(f"{comparison.name}, {comparison.mode}: {result.peer}: {result.reason}")
            continue
        speedup = comparison.speedup(result)
        shown = f"{speedup[0]:.2f}x" if speedup else ""
        less = result.peer == PRODUCT_ALONE  # it computes less: its numbers are others
        error = "" if result.error is None or less else f"{result.error:.0e}"
        kernels = alone.get(result.peer)
        cells = (comparison.name, comparison.mode, result.peer, report.duration(result.median), shown)
        table.add(
            *cells, report.duration(kernels) if kernels else "", *rate(cost, kernels or result.median, known), error
        )


def training(
    record: Record,
    device: str = "cuda",
    known: Ceilings | None = None,
    size: Size = GPT2,
    batches: Sequence[int] = (16, 32, 64),
    compiled: bool = True,
    seconds: float = 3.0,
) -> None:
    """Training steps in bf16 autocast: fastlm, launched and recorded, textbook eager, SDPA; then torch.compile, by
    itself and with max-autotune."""
    if device == "cuda":
        gpu()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    header = ("model and batch", "peer", "step", "tokens/s", "over eager", "rate", "of the product", "first loss")
    table = record.table("Training steps", header)
    ours = ("fastlm", RECORDED) if device == "cuda" else ("fastlm",)
    turns = [(batch, (*ours, BASELINE, "sdpa")) for batch in batches]
    turns += [(batch, (ours[-1], peer)) for peer in (COMPILE, MAX_AUTOTUNE) for batch in batches[:1] if compiled]
    for batch, names in turns:
        _steps(record, table, replace(size, batch=batch), names, dtype, device, known, seconds)


def _steps(
    record: Record,
    table: Any,
    size: Size,
    names: Sequence[str],
    dtype: torch.dtype,
    device: str,
    known: Ceilings | None,
    seconds: float,
) -> None:
    trainers: dict[str, Trainer] = {}
    for name in names:
        try:
            trainers[name] = _trainer(name, size, dtype, device)
        except Exception as error:
            record.note(f"training {size}: {name}: {reason_of(error)}")
    measured = timing.interleave({name: t.step for name, t in trainers.items()}, 9, seconds)
    eager = measured.get(BASELINE, Result(BASELINE)).median
    for name, result in measured.items():
        if result.median is None:
            record.note(f"training {size}: {name}: {result.reason}")
            continue
        flops = training_flops(size)
        shown, part = f"{flops / result.median / 1e12:,.1f} TFLOP/s", ""
        if known is not None:
            part = f"{flops / result.median / known.product:.0%}"
        over = f"{eager / result.median:.2f}x" if eager else ""
        tokens = f"{size.batch * size.length / result.median:,.0f}"
        loss = f"{trainers[name].losses[0]:.4f}"
        table.add(str(size), name, report.duration(result.median), tokens, over, shown, part, loss)


def _trainer(name: str, size: Size, dtype: torch.dtype, device: str) -> Trainer:
    if name == RECORDED:
        return _recorded(Trainer("fastlm", size, dtype, device))
    if name != MAX_AUTOTUNE:
        return Trainer(name, size, dtype, device)
    trainer = Trainer("sdpa", size, dtype, device)
    compiled: nn.Module = torch.compile(trainer.model, mode="max-autotune")  # type: ignore[assignment]
    trainer.model = compiled
    return trainer


def _recorded(trainer: Trainer) -> Trainer:
    """The same with its passes replayed, as `fastlm train` has them on one GPU."""
    direct = trainer.backward
    run = RecordedPass(lambda *batch: direct(), trainer.model.parameters())
    trainer.backward = lambda: run(trainer.idx, trainer.targets)  # type: ignore[method-assign]
    return trainer


def training_flops(size: Size) -> float:
    """Of a step's matrix products, forward and twice as much backward: 6 for each weight of a product and token, and
    attention's two products over the visible half."""
    c, tokens = size.config, size.batch * size.length
    weights = c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd
    return tokens * (6.0 * weights + 6.0 * c.n_layer * c.n_embd * size.length)


def decode(record: Record, device: str = "cuda", size: Size = GPT2, seconds: float = 5.0) -> None:
    """Greedy generation from one prompt."""
    if device == "cuda":
        gpu()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    table = record.table("Decoding", ("work", "peer", "time", "tokens/s", "over eager", "other tokens"))
    comparison = compare_generation(size, dtype, device, 9, seconds, {"torch.compile"})
    record.note("torch.compile: the textbook's cache grows with every token: each length would be compiled anew")
    for result in comparison.results:
        if result.median is None:
            record.note(f"{comparison.name}: {result.peer}: {result.reason}")
            continue
        speedup = comparison.speedup(result)
        over, tokens = f"{speedup[0]:.2f}x" if speedup else "", f"{result.extra['tokens_per_second']:,.0f}"
        other = "" if result.error is None else f"{result.error:.0%}"
        table.add(comparison.name, result.peer, report.duration(result.median), tokens, over, other)
