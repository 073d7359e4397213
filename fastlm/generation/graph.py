"""Decoding on a GPU: a step of one token a row is one CUDA graph, recorded once and replayed.

Launched from Python, the kernels of a small model's step take a tenth of the time that it takes to launch them. A graph
holds addresses, not values: what changes from token to token, the tokens and the rows' lengths, lies in memory of the
graph's own, and the stores of keys and values are read and written through those lengths.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.generation.cache import KVCache, RaggedCache, decode_attention, is_decoding
from fastlm.generation.fused import FusedStep
from fastlm.models.gpt import GPT
from fastlm.ops import graphs, native
from fastlm.ops.decode_attention.native import append


class _Stores(NamedTuple):
    """Keys and values of all rows, (B, S, H_kv, D) a layer."""

    keys: list[Tensor]
    values: list[Tensor]


class _DeviceCache:
    """A `Cache` whose lengths are on the device, so that a step's kernels and their arguments are always the same."""

    length = 0  # not known here; the caller has seen to it that there is room

    def __init__(self, stores: _Stores, lengths: Tensor) -> None:
        """lengths: (B) int64, the tokens that each row has."""
        self.stores, self.lengths = stores, lengths
        self.visible = (lengths + 1).int()

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        return self.lengths[:, None]

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if not is_decoding(q, k, v, options):
            raise AssertionError("a step that is not one token of causal attention was to be recorded")
        keys, values = self.stores.keys[layer], self.stores.values[layer]
        append(keys, values, k[:, 0], v[:, 0], self.lengths)
        return decode_attention(q, keys, values, self.visible, options)

    def advance(self, tokens: int) -> None:
        pass


class GraphDecoder:
    """From tokens to the logits of the next ones, while the model's weights and modules stay as they are: for one
    generation.

    A step's graph belongs to the memory of its cache. With another memory (rows have finished, a cache has grown) the
    next step runs kernel by kernel, as the first always does, and the one after it records a new graph.

    Args:
        model: one that `suits`.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self._memory: tuple | None = None  # of the caches that the step below is for
        self._replay: Callable[[], object] | None = None
        self._lengths: list[int] = []  # on the host, what `_at` holds
        self._fused = FusedStep(model) if FusedStep.suits(model) else None  # for one row

    @staticmethod
    def suits(model: Any) -> bool:
        """Whether the model is on a GPU, and every step does the same: fastlm's own, causal, unhooked, no autocast."""
        if type(model) is not GPT or model.device.type != "cuda" or torch.is_autocast_enabled("cuda"):
            return False
        return all(not (m._forward_hooks or m._forward_pre_hooks) for m in model.modules())

    def __call__(self, last: Tensor, cache: KVCache | RaggedCache) -> Tensor:
        """last (B, 1) token ids, which are appended to the cache -> logits (B, V), overwritten by the next call."""
        held = cache.stores()
        if held is None or torch.is_grad_enabled():
            return self.model.logits(self.model.hidden_states(last, cache=cache)[:, -1])
        with native.on_its_device(last):
            return self._run(last, cache, _Stores(*held))

    def _run(self, last: Tensor, cache: KVCache | RaggedCache, stores: _Stores) -> Tensor:
        memory = (last.shape, last.dtype, *(t.data_ptr() for t in (*stores.keys, *stores.values)))
        if memory != self._memory:
            self._memory, self._replay = memory, None
            self._last = torch.empty_like(last)
            self._at = torch.zeros(len(last), dtype=torch.int64, device=last.device)
            self._lengths = []
        lengths = cache.lengths()
        if lengths != self._lengths:
            self._at.copy_(torch.tensor(lengths))
        self._last.copy_(last)
        if self._replay is not None:
            self._replay()
        elif not self._lengths:  # loads the kernels, which must not happen while recording
            self._step(stores)
        else:
            self._replay = self._recorded(stores)
            self._replay()
        cache.advance(1)
        self._lengths = [n + 1 for n in lengths]
        return self._logits

    def _recorded(self, stores: _Stores) -> Callable[[], object]:
        """A step's graph; the step itself where none can be recorded."""
        try:
            return graphs.record(lambda: self._step(stores), self._at.device)[0].replay
        except RuntimeError as error:
            warnings.warn(f"tokens are decoded kernel by kernel, without a CUDA graph: {error}", stacklevel=5)
            return lambda: self._step(stores)

    def _step(self, stores: _Stores) -> None:
        """From `_last` and `_at` to `_logits`; `_at` then is one more."""
        cache = _DeviceCache(stores, self._at)
        if self._fused is not None and self._last.shape[0] == 1:
            self._logits = self._fused.logits(self._fused(self._last, cache))[:, -1]
        else:
            self._logits = self.model.logits(self.model.hidden_states(self._last, cache=cache)[:, -1])
        self._at += 1
