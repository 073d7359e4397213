"""What an encoder-decoder gives to beam search."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.generation.cache import KVCache
from fastlm.models.seq2seq import EncoderDecoder


class Translations:
    """An EncoderDecoder in the middle of its translations: the `Continuations` of beam search.

    Args:
        source: (B, S), of one length.
        begin: the token before the first of the target.
    """

    def __init__(self, model: EncoderDecoder, source: Tensor, begin: int) -> None:
        self._model, self._begin, self._rows = model, begin, source.shape[0]
        self._memory = model.encode(source)
        self._cache = KVCache(model.config.n_layer, 32)

    def first(self) -> Tensor:
        return self.next(torch.full((self._rows,), self._begin, device=self._model.device))

    def next(self, tokens: Tensor) -> Tensor:
        return self._model.logits(self._model.decode(tokens[:, None], self._memory, self._cache)[:, -1])

    def keep(self, rows: Tensor) -> None:
        self._cache.keep(rows)
        self._memory = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self._memory]
