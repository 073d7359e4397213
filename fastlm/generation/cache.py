"""Stores of the keys and values of the tokens so far, so that each new token costs one position and not all.

`KVCache` holds rows of one length; it is all that a batch of equal prompts needs. `RaggedCache` joins several of them,
of different lengths, into one batch for decoding: everything in the model that treats positions alone (projections,
MLP, norms, head: nearly all of the time) runs once over all rows, and attention runs once for each length. Rows need no
padding and no mask, so a row sees exactly the keys it would see alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm import ops

GROWTH = 256  # tokens: the least that a full cache grows by; it at least doubles, so that copying stays linear


class KVCache:
    """Keys and values of B rows of one length, (B, S, H_kv, D) a layer, S tokens preallocated.

    The first call fixes B, H_kv, D, dtype and device. A cache that is full grows.

    Args:
        n_layer: layers of the model.
        capacity: tokens to allocate at first.
    """

    def __init__(self, n_layer: int, capacity: int = GROWTH) -> None:
        self.length = 0  # tokens that all layers hold
        self._capacity = max(capacity, 1)
        self._keys: list[Tensor | None] = [None] * n_layer
        self._values: list[Tensor | None] = [None] * n_layer

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """The positions of the next tokens, (T)."""
        return torch.arange(self.length, self.length + tokens, device=device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, T, H_kv, D) behind what the layer has; returns views of all its keys and values."""
        end = self.length + k.shape[1]
        keys, values = (self._room(store, layer, t, end) for store, t in ((self._keys, k), (self._values, v)))
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Append k and v; q (B, T, H, D), the last T positions, attends to all. Returns (B, T, H, D)."""
        return ops.attention(q, *self.append(layer, k, v), **options)

    def advance(self, tokens: int) -> None:
        """All layers have stored this many tokens more."""
        self.length += tokens

    def addresses(self) -> list[int]:
        """For csrc/decode: rows, tokens, capacity, then where the keys of each layer lie, then the values.

        There is room for one more token in each layer then. Tokens must have been appended before.
        """
        for store in (self._keys, self._values):
            for layer, held in enumerate(store):
                assert held is not None
                self._room(store, layer, held, self.length + 1)
        stores: list[Any] = [*self._keys, *self._values]
        rows, capacity = stores[0].shape[:2]
        return [rows, self.length, capacity, *(t.data_ptr() for t in stores)]

    def clear(self) -> None:
        """Forget all tokens; the memory is kept."""
        self.length = 0

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, in this order: (N) int64."""
        self._keys = [None if t is None else t.index_select(0, rows) for t in self._keys]
        self._values = [None if t is None else t.index_select(0, rows) for t in self._values]

    def _room(self, store: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        """The layer's tensor, made or grown to hold `end` tokens."""
        held = store[layer]
        if held is not None and held.shape[1] >= end:
            return held
        grown = max(end, self._capacity if held is None else max(2 * held.shape[1], held.shape[1] + GROWTH))
        room = new.new_empty(new.shape[0], grown, *new.shape[2:])
        if held is not None:
            room[:, : self.length] = held[:, : self.length]
        store[layer] = room
        return room


class RaggedCache:
    """Several caches of different lengths as one batch: their rows one after the other."""

    def __init__(self, caches: Sequence[KVCache], rows: Sequence[int]) -> None:
        """rows: how many rows of the batch belong to each cache."""
        self.caches = list(caches)
        self.rows = list(rows)

    @property
    def length(self) -> int:
        """Tokens of the longest rows."""
        return max(cache.length for cache in self.caches)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """The positions of the next tokens of each row, (B, T)."""
        starts = [cache.length for cache, rows in zip(self.caches, self.rows, strict=True) for _ in range(rows)]
        return torch.tensor(starts, device=device)[:, None] + torch.arange(tokens, device=device)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Each cache's attention over its own rows of q, k and v."""
        parts = zip(self.caches, q.split(self.rows), k.split(self.rows), v.split(self.rows), strict=True)
        return torch.cat([cache.attention(layer, qs, ks, vs, **options) for cache, qs, ks, vs in parts])

    def advance(self, tokens: int) -> None:
        """All layers have stored this many tokens more."""
        for cache in self.caches:
            cache.advance(tokens)
