"""The report's pictures: speed-ups over eager PyTorch with their quartiles, and peak memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state of pyplot
from matplotlib.figure import Figure

from fastlm.bench.timing import BASELINE, Comparison

# Ours stands out; a peer keeps its colour in every picture.
COLOURS = {
    "fastlm": "#1b7f5c",
    "eager": "#9aa0a6",
    "sdpa": "#5b8def",
    "torch fused": "#5b8def",
    "torch.compile": "#e08e45",
    "transformers": "#b565a7",
    "flash-attn": "#c0504d",
    "liger": "#7a6c5d",
}


def write_plots(folder: Path, comparisons: list[Comparison], where: dict[str, Any]) -> list[Path]:
    """One PNG a kind of measurement that was made: ops.png, steps.png, memory.png."""
    device = where["gpu"] or f"{where['cpu']}, {where['threads']} threads"
    written = []
    for name, groups, title in (
        ("ops", ("op",), "Ops"),
        ("steps", ("step", "generation"), "Training steps and generation"),
    ):
        chosen = [c for c in comparisons if c.group in groups and any(c.speedup(r) for r in c.results)]
        if chosen:
            path = folder / f"{name}.png"
            _speedups(path, chosen, f"{title}: speed beside eager PyTorch\n{device}")
            written.append(path)
    chosen = [c for c in comparisons if c.group == "memory" and any(r.peak_bytes for r in c.results)]
    if chosen:
        path = folder / "memory.png"
        _memory(path, chosen, f"Peak memory of a training step\n{device}")
        written.append(path)
    return written


def _speedups(path: Path, comparisons: list[Comparison], title: str) -> None:
    peers = [p for p in _peers(comparisons) if p != BASELINE]
    figure, axes = _figure(len(comparisons), len(peers), title)
    height = 0.8 / max(1, len(peers))
    for k, peer in enumerate(peers):
        for row, comparison in enumerate(comparisons):
            result = next((r for r in comparison.results if r.peer == peer), None)
            speedup = comparison.speedup(result) if result is not None else None
            if speedup is None:
                continue
            middle, low, high = speedup
            y = row + (k - (len(peers) - 1) / 2) * height
            axes.barh(y, middle, height * 0.9, color=_colour(peer), label=peer)
            axes.plot([low, high], [y, y], color="black", linewidth=1)
            axes.text(high, y, f" {middle:.2f}", va="center", fontsize=7)
    axes.axvline(1.0, color=COLOURS[BASELINE], linewidth=1)
    axes.set_xlabel("times as fast as eager (median of the rounds' ratios; line: quartiles)")
    axes.set_xlim(left=0)
    _finish(path, figure, axes, [f"{c.name}\n{c.mode}, {c.dtype}" for c in comparisons])


def _memory(path: Path, comparisons: list[Comparison], title: str) -> None:
    peers = _peers(comparisons)
    figure, axes = _figure(len(comparisons), len(peers), title)
    height = 0.8 / len(peers)
    for k, peer in enumerate(peers):
        for row, comparison in enumerate(comparisons):
            result = next((r for r in comparison.results if r.peer == peer and r.peak_bytes), None)
            if result is None or result.peak_bytes is None:
                continue
            y = row + (k - (len(peers) - 1) / 2) * height
            axes.barh(y, result.peak_bytes / 2**30, height * 0.9, color=_colour(peer), label=peer)
            axes.text(result.peak_bytes / 2**30, y, f" {result.peak_bytes / 2**30:.2f}", va="center", fontsize=7)
    axes.set_xlabel("GiB")
    _finish(path, figure, axes, [f"{c.name}\n{c.dtype}" for c in comparisons])


def _peers(comparisons: list[Comparison]) -> list[str]:
    measured = [r.peer for c in comparisons for r in c.results if r.seconds or r.peak_bytes]
    return sorted(dict.fromkeys(measured), key=lambda p: (not p.startswith("fastlm"), p != BASELINE))


def _colour(peer: str) -> str:
    return COLOURS["fastlm"] if peer.startswith("fastlm") else COLOURS.get(peer, "#444444")


def _figure(rows: int, peers: int, title: str) -> tuple[Any, Any]:
    figure = Figure(figsize=(9, 1.6 + rows * (0.35 + 0.17 * peers)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    return figure, axes


def _finish(path: Path, figure: Any, axes: Any, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))  # one entry a peer
    axes.legend(handles.values(), handles.keys(), fontsize=8, loc="lower right")
    figure.savefig(path)
