"""Byte-pair encoding from tiktoken's ranks, through the `tiktoken` library where it is installed."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
PREFIX = "tiktoken:"
SUFFIX = ".tiktoken"

# A file of ranks does not say where the text is split before the merging, nor what ends a document. These are the
# published splits of the vocabularies of that name.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt2": (_GPT2, 50256),
    "r50k_base": (_GPT2, 50256),
    "p50k_base": (_GPT2, 50256),
    "cl100k_base": (_CL100K, 100257),
}


class RanksTokenizer(Tokenizer):
    """A tiktoken encoding behind fastlm's interface.

    Args:
        pattern: the regular expression that splits the text before the merging.
        ranks: the bytes of every token and its id, which is also the order of merging.
        special: tokens that no text gives; "<|endoftext|>" among them ends documents.

    Raises:
        ValueError: tiktoken is not installed, or the ranks are not a vocabulary.
    """

    kind = "tiktoken"

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]):
        tiktoken = _library()
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"the ranks {name} are no byte-level vocabulary: they lack the byte {missing[0]:#04x}")
        self.name, self.pattern, self.ranks, self.special = name, pattern, ranks, special
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size = self.encoding.n_vocab
        self.eot = special.get(END_OF_TEXT)
        self._text = frozenset(ranks.values())

    @classmethod
    def named(cls, name: str) -> RanksTokenizer:
        """One of tiktoken's own encodings ("gpt2", "cl100k_base", …), which it downloads once and keeps."""
        tiktoken = _library()
        if name not in tiktoken.list_encoding_names():
            raise ValueError(f"tiktoken has no encoding {name!r}; it has: {', '.join(tiktoken.list_encoding_names())}")
        try:
            encoding = tiktoken.get_encoding(name)
        except OSError as e:  # no connection, and not in its cache
            raise ValueError(f"tiktoken could not fetch the ranks of {name!r}: {e}") from None
        return cls(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)

    @classmethod
    def from_file(cls, path: str | Path) -> RanksTokenizer:
        """A file of ranks: a line a token, its bytes in base64 and its id. Its name tells how text is split."""
        path = Path(path)
        name = path.name.removesuffix(SUFFIX)
        if name not in SPLITS:
            known = ", ".join(f"{n}{SUFFIX}" for n in SPLITS)
            raise ValueError(f"{path}: how this vocabulary splits text is known only for {known}")
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line:
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(f"{path}:{number} is not a token in base64 and its rank: {line[:40]!r}") from None
        pattern, end = SPLITS[name]
        return cls(name, pattern, ranks, {END_OF_TEXT: end})

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> RanksTokenizer:
        """The reverse of `spec`."""
        ranks = {base64.b64decode(token): int(rank) for token, rank in spec["ranks"].items()}
        return cls(spec["name"], spec["pattern"], ranks, spec["special"])

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, dtype=self.dtype) for ids in self.encoding.encode_ordinary_batch(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode_bytes([int(i) for i in ids if int(i) in self._text]).decode("utf-8", "replace")

    def spec(self) -> dict[str, Any]:
        ranks = {base64.b64encode(token).decode(): rank for token, rank in self.ranks.items()}
        return {"kind": self.kind, "name": self.name, "pattern": self.pattern, "ranks": ranks, "special": self.special}


def _library() -> Any:
    if importlib.util.find_spec("tiktoken") is None:
        raise ValueError("this vocabulary needs the package tiktoken: pip install tiktoken")
    import tiktoken

    return tiktoken
