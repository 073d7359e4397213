"""The corpus that every interpreter carries: the source of Python's own standard library."""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from pathlib import Path

from fastlm.data.documents import Document, digest_fraction

# Left out: other people's packages; tests (some distributions ship none, and many hold odd encodings on purpose);
# tables that are data rather than code; and what the installation writes itself.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "lib-dynload",
    "test", "tests", "idle_test", "encodings", "pydoc_data",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
LETTERS = 2 / 3  # a file with fewer letters among its visible characters is a table (html/entities.py, locale.py)
VAL_FRACTION = 0.06


def stdlib_documents(
    max_bytes: int | None = None, root: str | Path | None = None
) -> tuple[list[Document], list[Document]]:
    """(train, val) documents: the .py files of the standard library, in an order given by their hash.

    Identical files are taken once, and tables of data are left out.

    A file goes to validation by a hash of its text: neither the order nor the cap moves one to the other side.

    Args:
        max_bytes: take files until there is this much text; None: all of them.
        root: where the library lies; None: where this interpreter's does.

    Raises:
        FileNotFoundError: this Python ships without sources (an embedded or a zipped one).
    """
    root = Path(root if root is not None else sysconfig.get_path("stdlib"))
    texts: dict[str, tuple[str, str]] = {}  # digest of the text -> (name, text)
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith(SKIPPED_PREFIXES):
            continue
        text = _read_source(path)
        if text:
            texts.setdefault(hashlib.sha256(text.encode()).hexdigest(), (relative.as_posix(), text))
    if not texts:
        raise FileNotFoundError(
            f"no Python sources of the standard library in {root}: give a text with --data FILE_OR_FOLDER"
        )
    train: list[Document] = []
    val: list[Document] = []
    total = 0
    for digest in sorted(texts):
        name, text = texts[digest]
        if max_bytes is not None and total >= max_bytes:
            break
        total += len(text.encode())
        (val if digest_fraction(text) < VAL_FRACTION else train).append(Document.from_text(name, text))
    return train, val


def _read_source(path: Path) -> str:
    try:
        with tokenize.open(path) as f:  # honours the coding line
            text = f.read()
        text.encode()
    except (OSError, UnicodeError, SyntaxError):
        return ""
    visible = sum(not c.isspace() for c in text)
    return text if sum(c.isalpha() for c in text) >= LETTERS * visible else ""
