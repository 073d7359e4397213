"""Labelled texts and pairs from TSV, CSV and JSONL files, their columns by name."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastlm.hints import did_you_mean

FORMATS = (".tsv", ".csv", ".jsonl")


def read_table(path: str | Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The given columns of every row, in the order asked for.

    Args:
        path: .tsv (a tab between fields, quotes are ordinary characters), .csv (RFC 4180), both with the columns' names
            in the first line; or .jsonl (an object a line; numbers become their text).

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, not UTF-8, a column that is missing (the error names those that are there), a row
            without one, or no rows. With the number of the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: wanted a file of one of the formats {', '.join(FORMATS)}, got {path.suffix!r}")
    try:
        rows = list(_json_rows(path, columns) if path.suffix == ".jsonl" else _separated_rows(path, columns))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _separated_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = _numbered(path, csv.reader(file, **options))
        _, header = next(reader, (0, []))
        places = [_place(path, header, column) for column in columns]
        for number, row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{path}:{number}: {len(row)} fields, the first line names {len(header)} columns "
                    f"({', '.join(header)})"
                )
            yield tuple(row[place] for place in places)


def _numbered(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv.reader, each with the number of its last line."""
    csv.field_size_limit(1 << 30)  # a text may be as long as a book
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: wanted an object, got {line.strip()[:60]!r}")
            for column in columns:
                _place(f"{path}:{number}", list(row), column)
                if not isinstance(row[column], (str, int, float)):
                    raise ValueError(f"{path}:{number}: {column} must be a string or a number, got {row[column]!r}")
            yield tuple(str(row[column]) for column in columns)


def _place(where: object, header: list[str], column: str) -> int:
    if column not in header:
        hint = did_you_mean(column, header)
        raise ValueError(f"{where}: there is no column {column!r}{hint}; it has: {', '.join(header) or 'none'}")
    return header.index(column)
