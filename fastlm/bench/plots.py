"""The report's pictures: speed-ups over eager PyTorch with their quartiles, and peak memory."""

from __future__ import annotations

from dataclasses import dataclass
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
    "torch fused": "#86c5da",
    "torch.compile": "#e08e45",
    "transformers": "#b565a7",
    "flash-attn": "#c0504d",
    "liger": "#7a6c5d",
}


@dataclass
class Bar:
    peer: str
    value: float
    low: float
    high: float


def write_plots(folder: Path, comparisons: list[Comparison], where: dict[str, Any]) -> list[Path]:
    """One PNG a kind of measurement that was made: ops.png, steps.png, memory.png."""
    device = where["gpu"] or f"{where['cpu']}, {_count(where['threads'], 'thread')}"
    speed = "times as fast as eager PyTorch (median of the rounds' ratios; line: quartiles)"
    pictures = (
        ("ops", ("op",), _speedups, f"Ops\n{device}", speed),
        ("steps", ("step", "generation"), _speedups, f"Training steps and generation\n{device}", speed),
        ("memory", ("memory",), _peaks, f"Peak memory of a training step\n{device}", "GiB"),
    )
    written = []
    for name, groups, bars_of, title, unit in pictures:
        rows = {f"{c.name}\n{c.mode}, {c.dtype}": bars_of(c) for c in comparisons if c.group in groups}
        rows = {label: bars for label, bars in rows.items() if bars}
        if rows:
            written.append(folder / f"{name}.png")
            _draw(written[-1], rows, title, unit)
    return written


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _speedups(comparison: Comparison) -> list[Bar]:
    bars = []
    for result in comparison.results:
        speedup = comparison.speedup(result)
        if speedup is not None and result.peer != BASELINE:
            bars.append(Bar(result.peer, *speedup))
    return sorted(bars, key=lambda bar: not bar.peer.startswith("fastlm"))


def _peaks(comparison: Comparison) -> list[Bar]:
    sizes = {r.peer: r.peak_bytes / 2**30 for r in comparison.results if r.peak_bytes is not None}
    return [Bar(peer, size, size, size) for peer, size in sizes.items()]


def _draw(path: Path, rows: dict[str, list[Bar]], title: str, unit: str) -> None:
    height = 0.22 * sum(map(len, rows.values())) + 0.2 * len(rows) + 1.4  # inches
    figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    y, ticks = 0.0, []
    drawn: dict[str, Any] = {}
    for bars in rows.values():
        ticks.append(y + (len(bars) - 1) / 2)
        for bar in bars:
            colour = COLOURS["fastlm"] if bar.peer.startswith("fastlm") else COLOURS.get(bar.peer, "#444444")
            drawn[bar.peer] = axes.barh(y, bar.value, 0.9, color=colour)
            if bar.high > bar.low:
                axes.plot([bar.low, bar.high], [y, y], color="black", linewidth=1)
            axes.text(max(bar.value, bar.high), y, f" {bar.value:.2f}", va="center", fontsize=7)
            y += 1
        y += 0.9
    if unit != "GiB":
        axes.axvline(1.0, color=COLOURS[BASELINE], linewidth=1)
    axes.set_yticks(ticks, list(rows), fontsize=8)
    axes.set_ylim(y - 0.9, -1)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.05)  # room for the last number
    axes.set_xlabel(unit, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(drawn.values(), drawn.keys(), fontsize=8, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path)
