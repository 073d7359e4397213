"""`fastlm prepare` as a function: files, a tokenizer by name, a split, a dataset folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.data.bpe import BPETokenizer
from fastlm.data.documents import Document, ReadReport, read_documents
from fastlm.data.prepare import SplitPieces, check_free, remove_leftovers, split_by_document, split_tail, write_dataset
from fastlm.data.tokenizers import CharTokenizer, Tokenizer, make_tokenizer


@dataclass(frozen=True)
class PrepareOptions:
    """The options of `fastlm prepare`, under the same names."""

    tokenizer: str = "bytes"
    vocab_size: int = 8192
    val: float = 0.1
    text_key: str = "text"
    on_bad_text: str = "error"
    overwrite: bool = False


def prepare_files(
    files: Sequence[Path],
    out: str | Path,
    options: PrepareOptions,
    *,
    val_files: Sequence[Path] = (),
    report: ReadReport | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Make a dataset folder from files; returns its manifest. A tokenizer trained here sees the training split only.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: as the parts do, with the file's name.
    """
    if not 0 <= options.val < 1:
        raise ValueError(f"val must be at least 0 and less than 1, got {options.val}")
    remove_leftovers(Path(out))
    check_free(out, overwrite=options.overwrite)

    def documents(of: Sequence[Path], counts: ReadReport | None = None) -> Iterator[Document]:
        return read_documents(of, text_key=options.text_key, on_bad_text=options.on_bad_text, report=counts)

    def pieces(counts: ReadReport | None = None) -> SplitPieces:
        if val_files:
            yield from _all_to("train", documents(files, counts))
            yield from _all_to("val", documents(val_files, counts))
        else:
            yield from split_documents(documents(files, counts), options.val)

    left_out = ReadReport()
    if next(documents([*files, *val_files], left_out), None) is None:  # before a tokenizer is trained on nothing
        raise ValueError(f"there is no text to tokenize{left_out.in_words()}")
    tokenizer = _tokenizer(options, pieces)
    about = {"sources": [str(p) for p in itertools.islice(itertools.chain(files, val_files), 100)]}
    return write_dataset(pieces(report), out, tokenizer, overwrite=options.overwrite, progress=progress, about=about)


FEW_DOCUMENTS = 100  # fewer than this, and a tenth of them may by chance be none


def split_documents(documents: Iterable[Document], val_fraction: float) -> SplitPieces:
    """Few documents: the end of each one is held out. Many: whole documents are."""
    stream = iter(documents)
    head = list(itertools.islice(stream, FEW_DOCUMENTS))
    if len(head) < FEW_DOCUMENTS:
        return itertools.chain.from_iterable(split_tail(document, val_fraction) for document in head)
    return split_by_document(itertools.chain(head, stream), val_fraction)


def _all_to(split: str, documents: Iterable[Document]) -> SplitPieces:
    for document in documents:
        for piece in document.pieces():
            yield split, piece, False
        yield split, "", True


def _tokenizer(options: PrepareOptions, pieces: Callable[[], SplitPieces]) -> Tokenizer:
    if options.tokenizer == "chars":
        return CharTokenizer.train(text for _, text, _ in pieces())  # of both splits: a character is no secret
    if options.tokenizer == "bpe":
        return BPETokenizer.train((text for split, text, _ in pieces() if split == "train"), options.vocab_size)
    return make_tokenizer(options.tokenizer)
