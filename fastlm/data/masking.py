"""Masked prediction: which tokens are left out, and what stands in their place.

Devlin et al.: BERT (arXiv:1810.04805): 15 % of the tokens; of these 80 % become the mask, 10 % another token, and
10 % stay.
Liu et al.: RoBERTa (arXiv:1907.11692): drawn anew each time a text is seen ("dynamic").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlm.data.batches import Batch
from fastlm.data.bpe import BPETokenizer
from fastlm.data.loader import WindowLoader
from fastlm.data.special import special_ids
from fastlm.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from fastlm.ops.linear_cross_entropy import IGNORED

_EVALUATION_SEED = 2**31 - 1  # the validation text is masked the same way every time


class MaskingRules(Protocol):
    """The numbers of `fastlm.training.config.MaskingConfig`."""

    rate: float
    mask: float
    random: float
    whole_word: bool


@dataclass(frozen=True)
class Masker:
    """Leaves out tokens of batches of ids.

    Args:
        mask_id: what stands in their place.
        ordinary: (V) bool, the ids that may be left out, and may stand in another's place.
        words: (2, V) bool, for whole words: which ids always begin a word, and which end one. None: single tokens.
        rate, mask, random: of `MaskingConfig`.
    """

    mask_id: int
    ordinary: Tensor
    words: Tensor | None
    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1

    @classmethod
    def make(cls, tokenizer: Tokenizer, rules: MaskingRules, mask_id: int | None) -> Masker:
        """For a tokenizer's vocabulary; `mask_id` may lie behind it. None: the vocabulary's own mask."""
        special = special_ids(tokenizer)
        mask_id = special.mask if mask_id is None else mask_id
        if mask_id is None:
            raise ValueError("neither the model (mask_token_id) nor the tokenizer ([MASK], <mask>) has a mask")
        ordinary = torch.ones(max(tokenizer.vocab_size, mask_id + 1), dtype=torch.bool)
        ordinary[[*special.all(), mask_id]] = False
        ordinary[tokenizer.vocab_size :] = False
        words = word_table(tokenizer, len(ordinary)) if rules.whole_word else None
        return cls(mask_id, ordinary, words, rules.rate, rules.mask, rules.random)

    def __call__(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """ids (B, T) -> x (B, T) with tokens left out, and y (B, T): what stood there, -100 elsewhere.

        In each row round(rate * its ordinary tokens) are chosen, at least one where there is one. Whole words are
        chosen in random order up to that number; a word that would exceed it is left alone unless it is the first.
        """
        ordinary = self.ordinary[ids]
        order = torch.rand(ids.shape, generator=generator)
        action = torch.rand(ids.shape, generator=generator)
        others = self.ordinary.nonzero().squeeze(1)
        other = others[torch.randint(len(others), ids.shape, generator=generator)]
        count = (ordinary.sum(1, keepdim=True) * self.rate).round().clamp(min=1)  # (B, 1)
        chosen = self._choose(ids, order.masked_fill(~ordinary, 2.0), count) & ordinary
        y = torch.where(chosen, ids, IGNORED)
        x = torch.where(chosen & (action < self.mask), self.mask_id, ids)
        return torch.where(chosen & (action >= 1 - self.random), other, x), y

    def _choose(self, ids: Tensor, order: Tensor, count: Tensor) -> Tensor:
        if self.words is None:
            return _rank(order) < count
        begins, ends = self.words[0][ids], self.words[1][ids]
        begins[:, 1:] |= ends[:, :-1]
        begins[:, 0] = True
        word = begins.cumsum(1) - 1  # (B, T): the number of each token's word
        first = torch.full_like(order, 3.0).scatter_reduce(1, word, order, "amin")  # (B, words)
        rank = _rank(first.gather(1, word))  # the tokens of a word stay together: the sort is stable
        zeros = torch.zeros_like(order)
        last = zeros.scatter_reduce(1, word, rank.to(order.dtype), "amax").gather(1, word)
        is_first = zeros.scatter_reduce(1, word, (rank == 0).to(order.dtype), "amax").gather(1, word) > 0
        return (last < count) | is_first


def _rank(values: Tensor) -> Tensor:
    """The place of each value in its sorted row."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)


def word_table(tokenizer: Tokenizer, size: int) -> Tensor:
    """(2, size) bool: the ids that begin a word whatever stands before them, and those after which one begins.

    WordPiece marks what goes on with ##. Elsewhere a space, which byte-level BPE has at the front of a token, or a
    punctuation mark begins a word, and a token that ends in one ends it.
    """
    table = torch.ones(2, size, dtype=torch.bool)
    for token, text in _token_texts(tokenizer):
        if text.startswith("##"):
            table[0, token] = False
        elif not _is_word_piece(tokenizer):
            table[0, token] = not _in_word(text[:1])
        table[1, token] = not _is_word_piece(tokenizer) and not _in_word(text[-1:])
    if not isinstance(tokenizer, (BPETokenizer, ByteTokenizer, CharTokenizer)):
        raise ValueError(f"masking.whole_word needs to see the tokens' texts; a {type(tokenizer).__name__} hides them")
    return table


def _token_texts(tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    if isinstance(tokenizer, BPETokenizer):
        return ((i, token) for token, i in tokenizer.backend.get_vocab(with_added_tokens=False).items())
    if isinstance(tokenizer, CharTokenizer):
        return iter(enumerate(tokenizer.characters))
    return ((i, chr(i)) for i in range(256))


def _is_word_piece(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer, BPETokenizer) and type(tokenizer.backend.model).__name__ == "WordPiece"


def _in_word(character: str) -> bool:
    # What lies beyond ASCII are letters, or, in byte-level BPE, parts of them; there Ġ, Ċ, ĉ and č are white space.
    return (character.isalnum() or character > "\x7f") and character not in "ĠĊĉč"


class MaskedLoader:
    """A `WindowLoader`'s windows with tokens left out, anew each time: a function of the seed and the sample number."""

    def __init__(self, windows: WindowLoader, masker: Masker):
        self.windows, self.masker = windows, masker
        self.batch_size, self.block_size = windows.batch_size, windows.block_size

    @property
    def samples(self) -> int:
        """Windows taken so far by all processes together."""
        return self.windows.samples

    @property
    def bytes_per_token(self) -> float | None:
        """None: the loss is that of some tokens given the others, not of the text."""
        return None

    def next_batch(self) -> Batch:
        """x, y: int64 (batch_size, block_size); y is -100 but at the tokens left out."""
        first = self.windows.samples + self.windows.rank * self.batch_size
        x, _ = self.windows.next_batch()
        return self.masker(x, _generator(self.windows.seed, first))

    def weight(self, batch: Batch) -> float:
        """The number of tokens left out."""
        assert not isinstance(batch, dict)
        return int((batch[1] != IGNORED).sum())

    def evaluation_batches(self, count: int) -> Iterator[tuple[Batch, float]]:
        """Windows at even distances in batches, with their weights."""
        for number, ((ids, _), _) in enumerate(self.windows.evaluation_batches(count)):
            batch = self.masker(ids, _generator(_EVALUATION_SEED, number))
            yield batch, self.weight(batch)

    def state_dict(self) -> dict[str, Any]:
        """That of the windows: the masks follow from it."""
        return self.windows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self.windows.load_state_dict(state)


def _generator(seed: int, sample: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + sample * 2 + 1) % 2**63)
