"""Stores of the keys and values of the tokens so far, so that each new token costs one position and not all.

`KVCache` holds rows of one length; it is all that a batch of equal prompts needs. `RaggedCache` joins several of them,
of different lengths, into one batch for decoding: everything in the model that treats positions alone (projections,
MLP, norms, head: nearly all of the time) runs once over all rows, and so does attention where the caches lie side by
side in a `Pool`; else it runs once for each length, with the same bits. Rows need no padding and no mask, so a row sees
exactly the keys it would see alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm import ops

GROWTH = 256  # tokens: the least that a full cache grows by; it at least doubles, so that copying stays linear


def is_decoding(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> bool:
    """One new token a row, and none of what `ops.decode_attention` has no part in."""
    if (
        q.shape[1] != 1
        or not options.get("causal")
        or options.get("dropout_p")
        or options.get("cu_seqlens") is not None
    ):
        return False
    return not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, options: dict[str, Any]) -> Tensor:
    """`ops.decode_attention` with the options of `ops.attention`."""
    window = options.get("window")
    return ops.decode_attention(
        q,
        keys,
        values,
        lengths,
        scale=options.get("scale"),
        window=None if window is None or window[0] is None or window[0] < 0 else window[0],
        softcap=options.get("softcap", 0.0),
        alibi_slopes=options.get("alibi_slopes"),
    )


class Pool:
    """Keys and values of all rows of a batch, (B, S, H_kv, D) a layer: the rows of each cache are a part of them."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.count, self.capacity = rows, max(capacity, 1)
        self._tensors: dict[tuple[int, bool], Tensor] = {}

    def of(self, layer: int, values: bool, new: Tensor) -> Tensor:
        """The layer's keys or values; made like `new` (., ., H_kv, D) at the first call."""
        if (layer, values) not in self._tensors:
            self._tensors[layer, values] = new.new_empty(self.count, self.capacity, *new.shape[2:])
        return self._tensors[layer, values]

    def held(self, layer: int, values: bool) -> Tensor:
        """The same, once it is made."""
        return self._tensors[layer, values]


class PoolRows(NamedTuple):
    """Where in a pool a cache lives."""

    memory: Pool
    first: int
    rows: int


class KVCache:
    """Keys and values of B rows of one length, (B, S, H_kv, D) a layer, S tokens preallocated.

    The first call fixes B, H_kv, D, dtype and device. A cache that is full grows.

    Args:
        n_layer: layers of the model.
        capacity: tokens to allocate at first.
        pool: rows of a larger batch to live in, instead of memory of its own.
    """

    def __init__(self, n_layer: int, capacity: int = GROWTH, pool: PoolRows | None = None) -> None:
        self.length = 0  # tokens that all layers hold
        self.pool = pool
        self._lengths: Tensor | None = None  # (B) int32, kept for the layers of a step
        self._lengths_of: tuple[int, int, torch.device] | None = None  # what they were made for
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
        keys, values = self.append(layer, k, v)
        if not is_decoding(q, k, v, options):
            return ops.attention(q, keys, values, **options)
        return self.decode(q, keys, values, options)

    def decode(self, q: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any]) -> Tensor:
        """q (B, 1, H, D) attends to keys and values that were just stored."""
        length = self.length + 1
        if self._lengths is None or self._lengths_of != (length, len(q), q.device):
            self._lengths = torch.full((len(q),), length, dtype=torch.int32, device=q.device)
            self._lengths_of = (length, len(q), q.device)
        return decode_attention(q, keys, values, self._lengths, options)

    def advance(self, tokens: int) -> None:
        """All layers have stored this many tokens more."""
        self.length += tokens

    def addresses(self) -> list[int]:
        """For csrc/gpt/decode.h: rows, tokens, capacity, then where the keys of each layer lie, then the values.

        There is room for one more token in each layer then. Tokens must have been appended before.
        """
        for store in (self._keys, self._values):
            for layer, held in enumerate(store):
                assert held is not None
                self._room(store, layer, held, self.length + 1)
        stores: list[Any] = [*self._keys, *self._values]
        rows, capacity = stores[0].shape[:2]
        return [rows, self.length, capacity, *(t.data_ptr() for t in stores)]

    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        held = self._keys[0]
        return [self.length] * (0 if held is None else len(held))

    def stores(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """All keys and all values, (B, S, H_kv, D) a layer; None where there is no room for one more token."""
        held = [t for t in (*self._keys, *self._values) if t is not None and t.shape[1] > self.length]
        layers = len(self._keys)
        return (held[:layers], held[layers:]) if len(held) == 2 * layers else None

    def cut(self, length: int) -> None:
        """Forget all tokens but the first `length`; the memory is kept."""
        self.length = min(self.length, length)

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, in this order: (N) int64."""
        self.pool = None
        self._keys = [None if t is None else t.index_select(0, rows) for t in self._keys]
        self._values = [None if t is None else t.index_select(0, rows) for t in self._values]

    def _room(self, store: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        """The layer's tensor, made or grown to hold `end` tokens."""
        held = store[layer]
        if held is not None and held.shape[1] >= end:
            return held
        if held is None and self.pool is not None and end <= self.pool.memory.capacity:
            memory, first, count = self.pool
            room = memory.of(layer, store is self._values, new)[first : first + count]
            store[layer] = room
            return room
        self.pool = None
        grown = max(end, self._capacity if held is None else max(2 * held.shape[1], held.shape[1] + GROWTH))
        room = new.new_empty(new.shape[0], grown, *new.shape[2:])
        if held is not None:
            room[:, : self.length] = held[:, : self.length]
        store[layer] = room
        return room


class PrefixCache:
    """Keys and values of one sequence that outlive a call of `generate(..., prefix_cache=…)`.

    The next prompt is read from where it differs from that sequence: of a conversation that grows by a turn, only what
    is new. For one model, while its weights stay as they are.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []  # of the cache
        self._cache: KVCache | None = None

    def lend(self, prompt: list[int], n_layer: int) -> KVCache:
        """A cache that holds as much of the prompt as is known, but for its last token."""
        known = 0
        while known < min(len(self._tokens), len(prompt) - 1) and self._tokens[known] == prompt[known]:
            known += 1
        cache = KVCache(n_layer) if self._cache is None else self._cache
        self._tokens, self._cache = [], None  # until it is given back
        cache.cut(known)
        return cache

    def give_back(self, cache: KVCache, tokens: list[int]) -> None:
        """The cache, and the tokens that it holds."""
        self._tokens, self._cache = tokens, cache


class RaggedCache:
    """Several caches of different lengths as one batch: their rows one after the other."""

    def __init__(self, caches: Sequence[KVCache], rows: Sequence[int]) -> None:
        """rows: how many rows of the batch belong to each cache."""
        self.caches = list(caches)
        self.rows = list(rows)
        self._lengths: Tensor | None = None  # (B) int32

    @property
    def length(self) -> int:
        """Tokens of the longest rows."""
        return max(cache.length for cache in self.caches)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """The positions of the next tokens of each row, (B, T)."""
        return torch.tensor(self.lengths(), device=device)[:, None] + torch.arange(tokens, device=device)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Each cache's attention over its own rows of q, k and v."""
        parts = list(zip(self.caches, q.split(self.rows), k.split(self.rows), v.split(self.rows), strict=True))
        if not is_decoding(q, k, v, options):
            return torch.cat([cache.attention(layer, qs, ks, vs, **options) for cache, qs, ks, vs in parts])
        stored = [cache.append(layer, ks, vs) for cache, _, ks, vs in parts]
        pool = self._neighbours()
        if pool is None:
            return torch.cat(
                [part[0].decode(part[1], *held, options) for part, held in zip(parts, stored, strict=True)]
            )
        keys, values = (pool.memory.of(layer, values, k)[pool.first :][: pool.rows] for values in (False, True))
        if self._lengths is None:
            self._lengths = torch.tensor([n + 1 for n in self.lengths()], dtype=torch.int32, device=q.device)
        return decode_attention(q, keys, values, self._lengths, options)

    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return [cache.length for cache, rows in zip(self.caches, self.rows, strict=True) for _ in range(rows)]

    def stores(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """As `KVCache.stores`, where the caches lie one after the other in one pool; else None."""
        held = [cache.stores() for cache in self.caches]
        pool = self._neighbours()
        if pool is None or any(part is None for part in held):
            return None
        layers = range(len(self.caches[0]._keys))
        rows = slice(pool.first, pool.first + pool.rows)
        keys, values = ([pool.memory.held(i, which)[rows] for i in layers] for which in (False, True))
        return keys, values

    def _neighbours(self) -> PoolRows | None:
        """The rows of all caches together, where they lie one after the other in one pool."""
        first = self.caches[0].pool
        if first is None:
            return None
        count = 0
        for cache, rows in zip(self.caches, self.rows, strict=True):
            if cache.pool is None or cache.pool != (first.memory, first.first + count, rows):
                return None
            count += rows
        return PoolRows(first.memory, first.first, count)

    def advance(self, tokens: int) -> None:
        """All layers have stored this many tokens more."""
        self._lengths = None
        for cache in self.caches:
            cache.advance(tokens)
