"""From documents to a dataset folder: token shards by split, the tokenizer, and `dataset.json`.

    dataset/
      dataset.json            splits, their shards and counts
      tokenizer/
      train-00000.tokens  …   (fastlm/data/shards.py)
      val-00000.tokens
The folder is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.documents import Document, digest_fraction
from fastlm.data.shards import ShardHeader, ShardWriter
from fastlm.data.tokenizers import Tokenizer
from fastlm.files import exchange

MANIFEST = "dataset.json"
SHARD_SUFFIX = ".tokens"
SPLITS = ("train", "val")
BATCH_CHARS = 8 << 20  # handed to the tokenizer at once: enough to keep its threads busy, small beside any memory
SHARD_TOKENS = 1 << 28

SplitPieces = Iterator[tuple[str, str, bool]]  # (split, text, whether the document ends with it)


def split_by_document(documents: Iterable[Document], val_fraction: float) -> SplitPieces:
    """Whole documents to either side, by a hash of the first piece of their text: copies stay together."""
    for document in documents:
        pieces = document.pieces()
        piece = next(pieces, "")
        split = "val" if digest_fraction(piece) < val_fraction else "train"
        for following in pieces:
            yield split, piece, False
            piece = following
        yield split, piece, True


def split_tail(document: Document, val_fraction: float) -> SplitPieces:
    """One document: its last `val_fraction` of characters is for validation (nanoGPT's split)."""
    total = sum(len(piece) for piece in document.pieces())
    left = int(total * (1 - val_fraction))  # characters still to go to train
    if left == total:
        yield from (("train", piece, False) for piece in document.pieces())
        yield "train", "", True
        return
    for piece in document.pieces():
        if left and len(piece) >= left:
            yield "train", piece[:left], True
            piece, left = piece[left:], 0
        if piece:
            yield ("train" if left else "val"), piece, False
            left -= len(piece) if left else 0
    yield "val", "", True


def write_dataset(
    pieces: SplitPieces,
    folder: str | Path,
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Tokenize the pieces and write a dataset folder; returns what its dataset.json says.

    Memory is bounded by a few batches of text, whatever the size of the corpus. The `tokenizers` library runs one
    batch on all cores.

    Args:
        shard_tokens: a shard that has reached this many ids is closed, and the next begun.
        overwrite: replace a folder that is a dataset already.
        progress: called with the number of UTF-8 bytes done since the last call.
        about: further entries for dataset.json (where the text came from).

    Raises:
        FileExistsError: the folder exists (and is not a dataset, or `overwrite` is false).
        ValueError: there was no text at all.
        OSError: the disk is full, say; names the folder.
    """
    folder = Path(folder)
    folder = folder.resolve() if folder.is_symlink() else folder  # what it points to is replaced
    remove_leftovers(folder)
    check_free(folder, overwrite=overwrite)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        writers = {split: _SplitWriter(temporary, split, tokenizer, shard_tokens) for split in SPLITS}
        try:
            for batch in _batches(pieces):
                ids = tokenizer.encode_batch([text for _, text, _ in batch])
                for (split, text, ends), piece_ids in zip(batch, ids, strict=True):
                    done = len(text.encode("utf-8"))
                    with _writing(folder):
                        writers[split].write(piece_ids, done, ends)
                    if progress is not None:
                        progress(done)
            if not any(w.tokens for w in writers.values()):
                raise ValueError("there is no text to tokenize: every document is empty")
            with _writing(folder):
                splits = {split: writer.close() for split, writer in writers.items() if writer.tokens}
        except BaseException:
            for writer in writers.values():
                writer.discard()
            raise
        with _writing(folder):
            tokenizer.save(temporary / "tokenizer")
        manifest = {
            "format": 1,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eot": tokenizer.eot,
            "splits": splits,
            **(about or {}),
        }
        with _writing(folder):
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _put_in_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Names the dataset that cannot be written: the system's error of a full disk names nothing."""
    try:
        yield
    except OSError as error:
        before = "; the one before it is whole" if folder.exists() else ""
        raise OSError(f"the dataset {folder} could not be written: {error}{before}") from error


def _put_in_place(new: Path, folder: Path) -> None:
    """Give `new` the name `folder`; a dataset of that name goes away after."""
    if folder.exists():
        exchange(new, folder)
        shutil.rmtree(new, ignore_errors=True)
    else:
        os.replace(new, folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes left that were killed while they made this dataset; an old one that was to be replaced and
    has no successor gets its name back."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        process, _, kind = leftover.name.removeprefix(f".{folder.name}.").partition(".")
        if kind not in ("tmp", "old") or os.name != "posix" or not process.isdecimal() or _is_running(int(process)):
            continue
        if kind == "old" and not folder.exists():
            os.replace(leftover, folder)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0: only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_free(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise FileExistsError unless the folder is new or empty, or a dataset that may be replaced."""
    folder = Path(folder)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file, wanted a folder for the dataset")
    if os.path.ismount(folder):
        raise FileExistsError(f"{folder} is a mount point, which cannot be replaced in one step: choose a folder in it")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise FileExistsError(f"the folder {folder} exists and is not a fastlm dataset: choose another one")
    if not overwrite:
        raise FileExistsError(
            f"{folder} has a dataset already: choose another folder, or say that it may be replaced (--overwrite)"
        )
    if others := sorted(entry.name for entry in folder.iterdir() if not _is_of_a_dataset(entry)):
        raise FileExistsError(
            f"{folder} holds more than its dataset, which would be deleted with it: {', '.join(others[:5])}"
            f"{' …' if len(others) > 5 else ''}; move that, or choose another folder"
        )


def _is_of_a_dataset(entry: Path) -> bool:
    return entry.name in (MANIFEST, "tokenizer") or entry.suffix == SHARD_SUFFIX


def _batches(pieces: SplitPieces) -> Iterator[list[tuple[str, str, bool]]]:
    batch: list[tuple[str, str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """The shards of one split; the next is begun when one is full."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int):
        self._folder, self._split, self._tokenizer, self._shard_tokens = folder, split, tokenizer, shard_tokens
        self._shard: ShardWriter | None = None
        self._done: dict[str, ShardHeader] = {}
        self._in_document = False  # whether there are ids since the last end of a document
        self.tokens = 0

    def write(self, ids: np.ndarray, text_bytes: int, ends: bool) -> None:
        if not len(ids) and not self._in_document:
            return  # a document of no text at all leaves no trace
        if len(ids) and self._shard is not None and self._shard.tokens >= self._shard_tokens:
            self._close_shard()  # only now: the end of its last document may have come alone
        if self._shard is None:
            self._shard = ShardWriter(
                self._folder / f"{self._split}-{len(self._done):05d}{SHARD_SUFFIX}", self._tokenizer
            )
        self._shard.write(ids, text_bytes)
        if ends:
            self._shard.end_document()
        self._in_document = not ends
        self.tokens += len(ids)

    def _close_shard(self) -> None:
        if self._shard is not None:
            header = self._shard.close()
            self._done[self._shard.path.name] = header
            self._shard = None

    def close(self) -> dict[str, Any]:
        self._close_shard()
        headers = self._done.values()
        return {
            "shards": list(self._done),
            "tokens": sum(h.tokens for h in headers),
            "documents": sum(h.documents for h in headers),
            "text_bytes": sum(h.text_bytes for h in headers),
        }

    def discard(self) -> None:
        if self._shard is not None:
            self._shard.discard()
