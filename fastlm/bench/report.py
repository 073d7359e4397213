"""The report: where and how it was measured, as JSON, as tables and as pictures."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

import fastlm
from fastlm.bench.peers import backends_here
from fastlm.bench.timing import BASELINE, Comparison, Result

LIBRARIES = ("torch", "triton", "transformers", "flash_attn", "liger_kernel", "numpy")


def environment() -> dict[str, Any]:
    """What the numbers depend on: device, versions, commit, threads, date, and how busy the machine was."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fastlm": fastlm.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": backends_here(),
    }


def _commit() -> str | None:
    """The commit of the source tree, with "-dirty" where it was changed; of an installed package, what was built."""
    folder = Path(fastlm.__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        inside = ["git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"]
        subprocess.run(inside, capture_output=True, check=True)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        from fastlm.ops import native

        return native.C.build_info()["git_commit"] if native.C is not None else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    from fastlm.ops import native

    if native.cpu_unavailable() is not None:
        return platform.processor() or platform.machine()
    return f"{native.C.cpu_name()} ({native.C.cpu_isa()})"


def write_json(path: Path, where: dict[str, Any], options: dict[str, Any], comparisons: list[Comparison]) -> None:
    """Everything, the single times included."""
    report = {"environment": where, "options": options, "comparisons": [_plain(c) for c in comparisons]}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _plain(comparison: Comparison) -> dict[str, Any]:
    peers = []
    for result in comparison.results:
        speedup = comparison.speedup(result)
        peers.append(
            {
                "peer": result.peer,
                "median_seconds": result.median,
                "speedup": speedup
                and {"median": speedup[0], "lower_quartile": speedup[1], "upper_quartile": speedup[2]},
                "error": result.error,
                "peak_bytes": result.peak_bytes,
                "reason": result.reason,
                "seconds": result.seconds,
                **result.extra,
            }
        )
    head = {"group": comparison.group, "name": comparison.name, "mode": comparison.mode, "dtype": comparison.dtype}
    return {**head, "peers": peers}


def print_environment(console: Console, where: dict[str, Any]) -> None:
    device = where["gpu"] or where["cpu"]
    console.print(
        f"fastlm {where['fastlm']} ({where['commit'] or 'no commit'}), torch {where['versions']['torch']},"
        f" Python {where['python']}, {device}, {where['threads']} threads",
        style="bold",
        highlight=False,
    )
    load, cores = where["load_average"], where["cores"] or 1
    if load is not None and load > cores * 0.5:
        console.print(f"The machine is busy (load {load:.1f} on {cores} cores): expect wide quartiles.", style="yellow")


def table(comparison: Comparison) -> Group:
    """One comparison; who did not take part is left to `absent`."""
    title = Text.from_markup(f"[bold]{comparison.name}[/bold]  [dim]{comparison.mode}, {comparison.dtype}[/dim]")
    made = Table(box=box.SIMPLE_HEAD)
    made.add_column("peer", min_width=16)
    memory = comparison.group == "memory"
    rate = any("tokens_per_second" in r.extra for r in comparison.results)
    if memory:
        columns = ["peak memory", "of eager", "before the model"]
    else:
        columns = ["time", "speed-up", "quartiles", *(["tokens/s"] if rate else []), "error"]
    for name in columns:
        made.add_column(name, justify="right")
    for result in comparison.results:
        cells = _memory_cells(comparison, result) if memory else _time_cells(comparison, result, rate)
        if cells is not None:
            ours = result.peer.startswith("fastlm")
            made.add_row(result.peer, *cells, style="bold green" if ours else None)
    return Group(title, made)  # a title of the table's own would be broken at the table's width


def _time_cells(comparison: Comparison, result: Result, rate: bool) -> list[str] | None:
    if result.median is None:
        return None
    speedup = comparison.speedup(result)
    middle, low, high = (f"{s:.2f}" for s in speedup) if speedup else ("", "", "")
    error = "" if result.error is None else f"{result.error:.0e}" if result.error else "0"
    tokens = [f"{result.extra['tokens_per_second']:,.0f}"] if "tokens_per_second" in result.extra else [""]
    spread = f"{low} to {high}" if len(result.seconds) > 1 else ""
    return [duration(result.median), f"{middle}x" if middle else "", spread, *(tokens if rate else []), error]


def _memory_cells(comparison: Comparison, result: Result) -> list[str] | None:
    if result.peak_bytes is None:
        return None
    base = next((r.peak_bytes for r in comparison.results if r.peer == BASELINE), None)
    part = f"{result.peak_bytes / base:.0%}" if base else ""
    return [f"{result.peak_bytes / 2**20:,.0f} MiB", part, f"{result.extra['before_bytes'] / 2**20:,.0f} MiB"]


def absent(comparisons: list[Comparison]) -> Table | None:
    """Who did not take part, in what, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for comparison in comparisons:
        for result in comparison.results:
            if result.reason is not None:
                name = comparison.name.partition(" ")[0]
                names = reasons.setdefault((result.peer, result.reason.replace(f" for {name}", "")), [])
                if name not in names:
                    names.append(name)
    if not reasons:
        return None
    made = Table(title="Not measured, or not checked", title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for column in ("peer", "in", "because"):
        made.add_column(column)
    for (peer, reason), names in reasons.items():
        made.add_row(peer, ", ".join(names), reason)
    return made


def duration(seconds: float) -> str:
    """Three significant digits with a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:.0f} {unit}"
    raise AssertionError("unreachable")


def progress(text: str) -> None:
    """A line on stderr, where a terminal watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
