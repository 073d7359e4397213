"""Byte-pair encoding through the `tokenizers` library: trained here, or loaded from published files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from fastlm.data.tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# Names under which published vocabularies keep the token that ends a document, the likeliest first.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<eos>", "[SEP]")
GPT2_FILE_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


class BPETokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library (most of them BPE) behind fastlm's interface."""

    kind = "bpe"

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.backend.encode_special_tokens = True  # "<|endoftext|>" inside a document must not end it
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ids = (backend.token_to_id(name) for name in END_OF_TEXT_NAMES)
        self.eot = next((i for i in ids if i is not None), None)

    def begin_as_published(self) -> None:
        plain, framed = (self.backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        if plain and framed[1 : 1 + len(plain)] == plain:
            self._begin = framed[:1]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> BPETokenizer:
        """Train byte-level BPE (GPT-2's pre-tokenization) on the texts.

        Args:
            vocab_size: ids in all: 256 bytes, the merges, and end of text. At least 257.
            min_frequency: a pair seen less often is not merged, so a small text may give fewer ids.
        """
        if vocab_size < 257:
            raise ValueError(
                f"byte-level BPE needs at least 257 ids (256 bytes and end of text), got vocab_size={vocab_size}"
            )
        backend = _byte_level(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            show_progress=False,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def from_file(cls, path: str | Path) -> BPETokenizer:
        """Load a `tokenizer.json`."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: no such file")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as e:  # the library raises plain Exception
            raise ValueError(f"{path} is not a tokenizer.json that the tokenizers library reads: {e}") from None

    @classmethod
    def from_gpt2_files(cls, vocab: str | Path, merges: str | Path) -> BPETokenizer:
        """Load GPT-2's `vocab.json`/`encoder.json` and `merges.txt`/`vocab.bpe`."""
        for path in (vocab, merges):
            if not Path(path).is_file():
                raise FileNotFoundError(f"no such file: {path}")
        try:
            model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
        except Exception as e:
            raise ValueError(f"{vocab} and {merges} are not a GPT-2 vocabulary: {e}") from None
        backend = _byte_level(model)
        if backend.token_to_id(END_OF_TEXT) is not None:
            backend.add_special_tokens([END_OF_TEXT])
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_marked_up(self, text: str) -> list[int]:
        """As `encode`, but special tokens in the text are themselves: for what a chat template made."""
        self.backend.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self.backend.encode_special_tokens = True

    @property
    def special_tokens(self) -> list[str]:
        """The tokens that no text gives."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # One call into Rust for all texts: it runs them in parallel (TOKENIZERS_PARALLELISM, RAYON_NUM_THREADS).
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, dtype=self.dtype) for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokenizer": json.loads(self.backend.to_str())}

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, which the whole Hugging Face world reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")


def find_gpt2_files(folder: Path) -> tuple[Path, Path] | None:
    """The pair of files of a GPT-2 vocabulary in the folder, under either of their names."""
    for vocab, merges in GPT2_FILE_PAIRS:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return folder / vocab, folder / merges
    return None


def _byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend
