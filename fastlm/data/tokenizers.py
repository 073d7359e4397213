"""Tokenizers: one small interface over bytes, characters and BPE.

A tokenizer maps text to a list of ids and back, has one end-of-text id that separates documents and is never
produced by `encode`, and a fingerprint that is stored in every token file, so that a model is never fed with ids of
another vocabulary.
"""

from __future__ import annotations

import abc
import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPEC_FILE = "fastlm_tokenizer.json"


class Tokenizer(abc.ABC):
    """What every tokenizer can do. `eot` is the end-of-text id, None where a loaded vocabulary has none."""

    kind: str
    vocab_size: int
    eot: int | None

    _begin: list[int] | None = None

    @property
    def begin(self) -> list[int]:
        """What stands before a text that a model reads from its beginning: end of text, as between the documents of a
        dataset; after `begin_as_published` the vocabulary's own."""
        if self._begin is not None:
            return self._begin
        return [] if self.eot is None else [self.eot]

    def begin_as_published(self) -> None:
        """Begin texts as the vocabulary's own rules say (Llama's with "<s>"), where they say anything: for models that
        were not trained here."""
        self._begin = None

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens: "<|endoftext|>" written in a text is ordinary characters."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Special tokens give nothing; bytes that are no UTF-8 give U+FFFD."""

    @abc.abstractmethod
    def spec(self) -> dict[str, Any]:
        """A JSON-able description from which `load_tokenizer` builds the same tokenizer again."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as an array of `dtype`."""
        return [np.asarray(self.encode(text), dtype=self.dtype) for text in texts]

    def stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time and gives text as soon as its characters are complete."""
        return StreamDecoder(self.decode)

    @property
    def dtype(self) -> np.dtype:
        """The smallest dtype that holds every id: uint16 up to 65,536 ids, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the vocabulary and the rules: equal exactly when the ids mean the same."""
        canonical = json.dumps(self.spec(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder, from which `load_tokenizer` reads it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SPEC_FILE).write_text(json.dumps(self.spec(), ensure_ascii=False) + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, eot={self.eot})"


class StreamDecoder:
    """Incremental decoding for any vocabulary.

    The newest ids are decoded together with a few before them, and the text is held back while it ends in U+FFFD,
    that is, in the middle of a character. Decoding a window and not the single id keeps the leading space that some
    decoders strip at the start.
    """

    MAX_HELD = 8  # a UTF-8 character has at most four bytes: longer than this, U+FFFD is really meant

    def __init__(self, decode: Callable[[Iterable[int]], str]):
        self._decode = decode
        self._context: list[int] = []  # ids whose text is out already
        self._held: list[int] = []  # ids whose text is not yet out

    def push(self, token: int) -> str:
        """Text that became complete with this id, "" while a character is still open."""
        self._held.append(int(token))
        before = self._decode(self._context)
        text = self._decode(self._context + self._held)
        if text.endswith("\ufffd") and len(self._held) < self.MAX_HELD:
            return ""
        self._context, self._held = self._held, []
        return text[len(before) :]

    def flush(self) -> str:
        """What is still held back at the end of the stream."""
        before = self._decode(self._context)
        text = self._decode(self._context + self._held)
        self._held = []
        return text[len(before) :]


class _Utf8StreamDecoder(StreamDecoder):
    """Incremental decoding where an id below 256 is a byte."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(bytes([token])) if token < 256 else ""

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: id = byte, 256 = end of text. Any text can be encoded and nothing has to be trained."""

    kind = "bytes"
    vocab_size = 257
    eot = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        return _Utf8StreamDecoder()

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind}


class CharTokenizer(Tokenizer):
    """One id a character, sorted by code point (nanoGPT's character level); the id after the last is end of text."""

    kind = "chars"

    def __init__(self, characters: Iterable[str]):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise ValueError("a character tokenizer needs at least one character, got none (is the text empty?)")
        self.eot: int = len(self.characters)
        self.vocab_size = len(self.characters) + 1
        # code point -> id; eot marks what is unknown, and the last row stands for every code point beyond the table
        self._table = np.full(ord(self.characters[-1]) + 2, self.eot, dtype=self.dtype)
        self._table[[ord(c) for c in self.characters]] = np.arange(self.eot, dtype=self.dtype)

    @classmethod
    def train(cls, texts: Iterable[str]) -> CharTokenizer:
        """The tokenizer of all characters that occur in the texts."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        return cls(seen)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._look_up(text) for text in texts]

    def _look_up(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._table[np.minimum(code_points, len(self._table) - 1)]
        unknown = np.flatnonzero(ids == self.eot)
        if len(unknown):
            position = int(unknown[0])
            raise ValueError(
                f"character {text[position]!r} (U+{ord(text[position]):04X}) at position {position} is not among the "
                f"{len(self.characters)} characters this tokenizer was made from; "
                "a byte or BPE tokenizer encodes any text"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in ids if i < self.eot)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from what there is at `path`.

    A folder saved by `Tokenizer.save`, a `tokenizer.json` of the Hugging Face library (or its folder), a folder
    with GPT-2's `vocab.json`/`encoder.json` and `merges.txt`/`vocab.bpe`, or tiktoken's ranks (`cl100k_base.tiktoken`).

    Raises:
        FileNotFoundError: nothing of that kind is there.
        ValueError: a file is there and is damaged.
    """
    from fastlm.data.bpe import BPETokenizer, find_gpt2_files
    from fastlm.data.ranks import SUFFIX, RanksTokenizer

    path = Path(path)
    if path.is_file():
        if path.suffix == SUFFIX:
            return RanksTokenizer.from_file(path)
        return BPETokenizer.from_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no tokenizer at {path}: no such file or folder")
    if (path / SPEC_FILE).is_file():
        return _from_spec_file(path / SPEC_FILE)
    if (path / "tokenizer.json").is_file():
        return BPETokenizer.from_file(path / "tokenizer.json")
    pair = find_gpt2_files(path)
    if pair is not None:
        return BPETokenizer.from_gpt2_files(*pair)
    raise FileNotFoundError(
        f"no tokenizer in {path}: wanted {SPEC_FILE}, tokenizer.json, "
        "or vocab.json/encoder.json with merges.txt/vocab.bpe"
    )


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of bytes for "bytes", tiktoken's for "tiktoken:NAME", else what lies at the path."""
    from fastlm.data.ranks import PREFIX, RanksTokenizer

    if name.startswith(PREFIX):
        return RanksTokenizer.named(name.removeprefix(PREFIX))
    return ByteTokenizer() if name == "bytes" else load_tokenizer(name)


def _from_spec_file(path: Path) -> Tokenizer:
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        if spec["kind"] == "bytes":
            return ByteTokenizer()
        if spec["kind"] == "chars":
            return CharTokenizer(spec["characters"])
        if spec["kind"] == "tiktoken":
            from fastlm.data.ranks import RanksTokenizer

            return RanksTokenizer.from_spec(spec)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is not a fastlm tokenizer: {type(e).__name__}: {e}") from None
    raise ValueError(f"{path}: unknown kind of tokenizer {spec['kind']!r}; known: bytes, chars, tiktoken")
