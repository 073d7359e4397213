"""docs/kernels.md has one generated section a backend, between markers; everything else in it is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def markers(backend: str) -> tuple[str, str]:
    return f"<!-- {backend}: begin, generated -->", f"<!-- {backend}: end -->"


def section(backend: str) -> str:
    """What stands between the markers of a backend."""
    begin, end = markers(backend)
    _, _, rest = PATH.read_text().partition(begin + "\n")
    body, found, _ = rest.partition(end)
    if not found:
        raise ValueError(f"{PATH} lacks the lines {begin!r} and {end!r}")
    return body


def replace_section(backend: str, body: str) -> None:
    section(backend)  # the markers are there
    begin, end = markers(backend)
    before, _, rest = PATH.read_text().partition(begin + "\n")
    after = rest.partition(end)[2]
    PATH.write_text(f"{before}{begin}\n{body}{end}{after}")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""
    lines = [f"| {' | '.join(header)} |", f"|---|{'--:|' * (len(header) - 1)}"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines) + "\n"
