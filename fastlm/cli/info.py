"""`fastlm info`: what is installed, what was built, and what runs where."""

from __future__ import annotations

import platform
from typing import Any


def info() -> None:
    """Versions, processor, GPUs, what was built, and for every op which backends run here, or why not."""
    import torch
    from rich.console import Console
    from rich.table import Table

    import fastlm
    from fastlm.ops import registry

    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(torch, fastlm.__version__):
        facts.add_row(f"[bold]{name}[/]", str(value))
    console.print(facts)
    console.print()
    table, kernels = registry.table(), registry.implementations()
    backends = list(dict.fromkeys(name for row in table.values() for name in row))
    grid = Table(title="op x backend", title_justify="left", pad_edge=False)
    grid.add_column("op", no_wrap=True)
    for name in backends:
        grid.add_column(name)
    reasons: list[str] = []  # a reason stands once below the table, by its number
    for op, row in table.items():
        cells = []
        for name in backends:
            reason = row[name]
            if name not in kernels[op] or reason is None:
                cells.append("[dim]no kernel[/]" if name not in kernels[op] else "[green]yes[/]")
                continue
            if reason not in reasons:
                reasons.append(reason)
            cells.append(f"no ({reasons.index(reason) + 1})")
        grid.add_row(op, *cells)
    console.print(grid)
    console.print(
        "no kernel: there is none for this op on this backend; the reference runs everywhere", highlight=False
    )
    for number, reason in enumerate(reasons, 1):
        console.print(f"({number}) {reason}", highlight=False, markup=False)


def _facts(torch: Any, version: str) -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = [
        ("fastlm", version),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads"),
    ]
    try:
        from fastlm import _C  # type: ignore[attr-defined]
    except ImportError as e:
        facts.append(("CPU", platform.processor() or platform.machine()))
        facts.append(("fastlm._C", f"not built: {e}"))
    else:
        facts.append(("CPU", f"{_C.cpu_name()}: {_words(_C.cpu_features())}"))
        facts.append(("CPU kernels", f"{_C.cpu_isa()} (of {_words(_C.cpu_isas())})"))
        facts += [(f"built: {name}", _words(value)) for name, value in _C.build_info().items()]
    if not torch.cuda.is_available():
        facts.append(("GPU", "none that torch sees"))
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        facts.append(
            (f"GPU {i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
        )
    return facts


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
