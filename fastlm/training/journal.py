"""log.jsonl: one JSON object a line, written and flushed as things happen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from fastlm.files import replace_text


class Journal:
    """Appends records to a JSONL file. Every record has a "kind" (start, step, eval, sample, checkpoint, resume, end).

    Numbers are written with all their digits, so that two runs can be compared for equality.
    """

    def __init__(self, path: str | Path, *, keep_until_step: int | None = None):
        """Open for appending; `keep_until_step` first drops the records after that step (a resumed run)."""
        self.path = Path(path)
        if keep_until_step is not None and self.path.is_file():
            _truncate(self.path, keep_until_step)
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **values}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """All whole records; a last line cut off by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").split("\n"):  # a text in it may hold other separators of lines
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _truncate(path: Path, step: int) -> None:
    kept = [r for r in read_journal(path) if r.get("step", 0) <= step]
    replace_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
