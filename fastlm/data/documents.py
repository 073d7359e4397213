"""Documents from files, folders and JSONL, read as a stream: no file is ever held whole."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

PIECE_CHARS = 1 << 20  # a longer document is handed on in pieces of about this many characters
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair, which is no character
BAD_TEXT = ("error", "skip", "replace")


@dataclass(frozen=True)
class Document:
    """A text with a name; `pieces()` reads it anew each time, as a stream of non-empty strings."""

    name: str
    pieces: Callable[[], Iterator[str]]

    @classmethod
    def from_text(cls, name: str, text: str) -> Document:
        return cls(name, lambda: iter([text] if text else []))

    def read(self) -> str:
        """The whole text."""
        return "".join(self.pieces())


@dataclass
class ReadReport:
    """What reading left out; filled in while `read_documents` runs."""

    binary_files: int = 0
    utf16_files: int = 0
    undecodable: int = 0
    empty: int = 0

    def lines(self) -> list[str]:
        """What was left out, in words: how many of which kind."""
        kinds = (
            (self.binary_files, "binary files"),
            (self.utf16_files, "files in UTF-16 (make them UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW)"),
            (self.undecodable, "documents that are not UTF-8"),
            (self.empty, "empty documents"),
        )
        return [f"{count} {kind}" for count, kind in kinds if count]

    def in_words(self) -> str:
        """How a message goes on that there was no text; nothing where nothing was left out."""
        lines = self.lines()
        return f"; left out: {', '.join(lines)}" if lines else ""


def find_files(inputs: Sequence[str | Path], pattern: str = "*") -> list[Path]:
    """The files behind `inputs`: a file is itself, a folder all files in it that match `pattern`, in sorted order.

    Hidden files and folders (a name that starts with a dot) inside a folder are left out.

    Raises:
        FileNotFoundError: an input does not exist, or a folder has no file that matches.
    """
    files: list[Path] = []
    for item in map(Path, inputs):
        if item.is_file():
            files.append(item)
        elif item.is_dir():
            found = sorted(p for p in item.rglob(pattern) if p.is_file() and not _is_hidden(p.relative_to(item)))
            if not found:
                raise FileNotFoundError(f"the folder {item} has no file that matches {pattern!r}")
            files += found
        elif item.exists():
            raise ValueError(f"{item} is neither a file nor a folder (a pipe?): write its text to a file first")
        else:
            raise FileNotFoundError(f"no such file or folder: {item}")
    return files


def read_documents(
    files: Sequence[Path], *, text_key: str = "text", on_bad_text: str = "error", report: ReadReport | None = None
) -> Iterator[Document]:
    """Documents of the files, in order. A line of a .jsonl file is one document (its `text_key`); any other file is
    one document.

    `.gz` is read through gzip. Files with a zero byte near the start are taken for binary, or UTF-16 where they begin
    with its byte order mark, and left out.

    Args:
        on_bad_text: what to do with bytes that are not UTF-8: "error", "skip" the document, or "replace" them by
            U+FFFD.
        report: counts what was left out.

    Raises:
        ValueError: text that is not UTF-8 (with on_bad_text="error"), or a line that is not JSON with that key; says
            where.
    """
    if on_bad_text not in BAD_TEXT:
        raise ValueError(f"on_bad_text must be one of {', '.join(BAD_TEXT)}, got {on_bad_text!r}")
    report = report if report is not None else ReadReport()
    for path in files:
        start = _start(path)
        if b"\0" in start:
            if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                report.utf16_files += 1
            else:
                report.binary_files += 1
        elif path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
            yield from _jsonl_documents(path, text_key, on_bad_text, report)
        elif on_bad_text == "skip" and not _is_utf8(path):
            report.undecodable += 1
        elif next(_file_pieces(path, on_bad_text), None) is None:
            report.empty += 1
        else:
            yield Document(str(path), lambda path=path: _file_pieces(path, on_bad_text))  # type: ignore[misc]


def digest_fraction(text: str) -> float:
    """A number in [0, 1) from a hash of the text: equal texts fall on the same side of a split."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _open_bytes(path: Path) -> io.BufferedReader:
    return cast(io.BufferedReader, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Names the file whose compressed data turn out to be damaged."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def _start(path: Path) -> bytes:
    with _whole(path), _open_bytes(path) as f:
        return f.read(8192)


def _open_text(path: Path, on_bad_text: str) -> TextIO:
    # newline="": the text is taken as it is, "\r\n" included, so that decoding gives the file back; all but
    # a byte order mark, which is not part of the text.
    errors = "replace" if on_bad_text == "replace" else "strict"
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", errors=errors, newline="")


def _file_pieces(path: Path, on_bad_text: str) -> Iterator[str]:
    rest = ""
    with _whole(path), _open_text(path, on_bad_text) as f:
        try:
            while chunk := f.read(PIECE_CHARS):
                rest += chunk
                cut = _last_cut(rest)
                if cut:
                    yield rest[:cut]
                    rest = rest[cut:]
        except UnicodeDecodeError as e:
            raise ValueError(_not_utf8(path, e)) from None
    if rest:
        yield rest


def _last_cut(text: str) -> int:
    """Where to cut a growing text without changing an id: the last place before a space and after none; 0: not yet.

    There the pre-tokenization of byte-level BPE (GPT-2's and its successors') cuts too: the ids of the pieces are
    the ids of the whole. A text without such a place is cut anywhere once it is 16 pieces long.
    """
    if len(text) < PIECE_CHARS:
        return 0
    space = text.rfind(" ")
    while space > 0 and text[space - 1].isspace():
        space = text.rfind(" ", 0, space)
    if space > 0:
        return space
    return len(text) if len(text) >= 16 * PIECE_CHARS else 0


def _is_utf8(path: Path) -> bool:
    with _whole(path), _open_text(path, "error") as f:
        try:
            while f.read(PIECE_CHARS):
                pass
        except UnicodeDecodeError:
            return False
    return True


def _jsonl_documents(path: Path, text_key: str, on_bad_text: str, report: ReadReport) -> Iterator[Document]:
    with _whole(path), _open_bytes(path) as f:
        for number, line in enumerate(f, 1):
            name = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8", "replace" if on_bad_text == "replace" else "strict")
            except UnicodeDecodeError as e:
                if on_bad_text == "skip":
                    report.undecodable += 1
                    continue
                raise ValueError(_not_utf8(name, e)) from None
            try:
                row = json.loads(text)
                value = row[text_key]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{name}: wanted a JSON object with a key {text_key!r}, got {text.strip()[:80]!r}"
                ) from None
            if not isinstance(value, str):
                raise ValueError(f"{name}: {text_key!r} must be a string, got {type(value).__name__}")
            if _SURROGATE.search(value):
                if on_bad_text == "skip":
                    report.undecodable += 1
                    continue
                if on_bad_text == "error":
                    raise ValueError(
                        f"{name}: {text_key!r} has half a surrogate pair, which is no character; mend it, or let such "
                        "documents be skipped or replaced (--on-bad-text)"
                    )
                value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if value:
                yield Document.from_text(name, value)
            else:
                report.empty += 1


def _not_utf8(where: os.PathLike[str] | str, e: UnicodeDecodeError) -> str:
    got = f"byte 0x{e.object[e.start]:02x}" if e.start < len(e.object) else "an incomplete character at its end"
    return (
        f"{where} is not UTF-8 text: {got} ({e.reason}); "
        "convert it, or let such bytes be skipped or replaced (--on-bad-text)"
    )
