"""What a part of the run has found so far: tables and numbers, on the disk after every row."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class LeftOut(Exception):
    """A part that cannot run here; the message says why."""


class Record:
    """A part's results. Each change is written, in one step, so that a part that is killed leaves all before it."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.content: dict[str, Any] = {"status": "cut off", "reason": None, "tables": [], "notes": []}

    def table(self, title: str, header: Sequence[str]) -> Table:
        """A new table of this part."""
        made: dict[str, Any] = {"title": title, "header": list(header), "rows": []}
        self.content["tables"].append(made)
        return Table(self, made["rows"])

    def note(self, text: str) -> None:
        """A sentence: what was left out of the part, or what went wrong in it."""
        self.content["notes"].append(text)
        self.save()

    def finish(self, status: str, reason: str | None = None) -> None:
        """ "done", "failed" or "left out"."""
        self.content["status"], self.content["reason"] = status, reason
        self.save()

    def save(self) -> None:
        if self.path is not None:
            write(self.path, json.dumps(self.content, indent=1) + "\n")


class Table:
    """Rows of text and numbers."""

    def __init__(self, record: Record, rows: list[list[Any]]):
        self.record, self.rows = record, rows

    def add(self, *cells: Any) -> None:
        self.rows.append(list(cells))
        self.record.save()


def write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
