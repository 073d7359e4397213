"""Training windows from token shards.

Every sample is a pure function of (seed, sample number): nothing is drawn in order, nothing is shuffled in memory.
So the state of the loader is one integer, resuming is exact, and R processes that each take their part of the sample
numbers see together exactly what one process sees.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlm.data.batches import Batch, check_position
from fastlm.data.prepare import MANIFEST
from fastlm.data.shards import map_shard, read_header
from fastlm.data.tokenizers import Tokenizer, load_tokenizer

ORDERS = ("random", "shuffled")
DIGEST_TOKENS = 4096  # at either end of a shard
LOOKAHEAD = 4096  # samples located at once: numpy costs as much for 32 as for a thousand


class TokenData:
    """One split of a dataset folder: memory-mapped shards that belong together."""

    def __init__(self, paths: list[Path]):
        if not paths:
            raise ValueError("a split needs at least one shard, got none")
        headers = [read_header(path) for path in paths]
        for path, header in zip(paths, headers, strict=True):
            if header.fingerprint != headers[0].fingerprint:
                raise ValueError(f"{path} was made with another tokenizer than {paths[0]}")
        self.paths = paths
        self.arrays = [np.asarray(map_shard(path)) for path in paths]
        self.vocab_size, self.eot, self.fingerprint = headers[0].vocab_size, headers[0].eot, headers[0].fingerprint
        self.tokens = sum(h.tokens for h in headers)
        self.documents = sum(h.documents for h in headers)
        self.text_bytes = sum(h.text_bytes for h in headers)

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> TokenData:
        """Open a split of a folder made by `fastlm prepare`.

        Raises:
            FileNotFoundError: no dataset there, or a shard is missing.
            ValueError: a damaged or foreign file, or no such split.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            raise ValueError(f"the dataset {folder} has no split {split!r}, it has: {', '.join(manifest['splits'])}")
        data = cls([folder / name for name in manifest["splits"][split]["shards"]])
        if data.fingerprint != manifest["tokenizer"]:
            raise ValueError(f"the shards of {folder} were made with another tokenizer than its {MANIFEST} says")
        return data

    @functools.cached_property
    def digest(self) -> str:
        """Of the ids at both ends of every shard: tells one text from another without reading it all."""
        digest = hashlib.sha256()
        for array in self.arrays:
            digest.update(array[:DIGEST_TOKENS].tobytes() + array[-DIGEST_TOKENS:].tobytes())
        return digest.hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that one id stands for, on average: turns nats per token into bits per byte."""
        return self.text_bytes / self.tokens

    def check_read(self, ids: np.ndarray) -> None:
        """ValueError where ids that were read from the shards are not in the vocabulary."""
        if ids.max() >= self.vocab_size:
            raise ValueError(
                f"the shards in {self.paths[0].parent} are damaged: id {ids.max()} in a vocabulary of {self.vocab_size}"
            )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The dataset.json of a dataset folder, with a clear error where there is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a fastlm dataset: it has no {MANIFEST} (make one with `fastlm prepare`)"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["splits"], dict) or not isinstance(manifest["tokenizer"], str):
            raise TypeError("splits or tokenizer have the wrong type")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged: {type(e).__name__}: {e}") from None
    return manifest


def dataset_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer a dataset was made with; raises ValueError where the stored one is not the one of its shards."""
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    if tokenizer.fingerprint != read_manifest(folder)["tokenizer"]:
        raise ValueError(f"the tokenizer in {folder} is not the one its shards were made with")
    return tokenizer


class WindowLoader:
    """Batches of windows (x, y) of a split: y is x shifted by one token.

    Args:
        batch_size: windows per `next_batch` on this process.
        block_size: tokens in a window, T.
        order: "random" draws every window's start uniformly; "shuffled" goes through the text in windows that do not
            overlap, each once an epoch, in a new order and with a new offset every epoch.
        rank, world_size: this process takes every world_size-th batch of the global sequence.
    """

    def __init__(
        self,
        data: TokenData,
        batch_size: int,
        block_size: int,
        *,
        seed: int = 0,
        order: str = "random",
        rank: int = 0,
        world_size: int = 1,
    ):
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        if batch_size < 1 or block_size < 1:
            raise ValueError(f"batch_size and block_size must be positive, got {batch_size} and {block_size}")
        self.data, self.batch_size, self.block_size = data, batch_size, block_size
        self.seed, self.order, self.rank, self.world_size = seed, order, rank, world_size
        self.samples = 0  # windows taken so far by all processes together
        self._ahead = (0, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))  # first sample, shards, starts
        arrays = [a for a in data.arrays if len(a) > block_size]
        if not arrays:
            longest = max(len(a) for a in data.arrays)
            raise ValueError(
                f"the text is too short: {longest:,} tokens in one shard, "
                f"a window of block_size={block_size} needs {block_size + 1:,}"
            )
        self._windows = [np.lib.stride_tricks.sliding_window_view(a, block_size + 1) for a in arrays]
        lengths = np.array([len(a) for a in arrays], dtype=np.int64)
        # Windows per shard: every start is one ("random"), or every block_size-th, with room for the epoch's offset.
        self._counts = lengths - block_size if order == "random" else np.maximum(1, lengths // block_size - 1)
        # Offsets that are possible in a "shuffled" epoch.
        self._slack = np.minimum(block_size, lengths - self._counts * block_size)
        self._ends = np.cumsum(self._counts)

    @property
    def windows_per_epoch(self) -> int:
        """Different windows in one pass ("shuffled"), or different starts ("random")."""
        return int(self._ends[-1])

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x, y: int64 (batch_size, block_size), on the CPU."""
        first = self.samples + self.rank * self.batch_size
        self.samples += self.world_size * self.batch_size
        begin, shard, start = self._ahead
        if not begin <= first <= first + self.batch_size <= begin + len(shard):
            count = max(LOOKAHEAD, self.batch_size)
            begin, shard, start = self._ahead = (first, *self._locate(np.arange(first, first + count, dtype=np.uint64)))
        rows = slice(first - begin, first - begin + self.batch_size)
        return self._gather(shard[rows], start[rows])

    @property
    def bytes_per_token(self) -> float | None:
        """Of the text: turns the loss into bits per byte. None where the loss is not that of a text."""
        return self.data.bytes_per_token

    def weight(self, batch: Batch) -> None:
        """None: every token is a target, and the batches are of one size."""

    def evaluation_batches(self, count: int) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], int]]:
        """`count` windows at even distances over the whole split, but no more than cover it; in batches, each with its
        weight in the mean loss (its windows).

        Does not move the position of the loader.
        """
        lengths = [len(w) for w in self._windows]
        ends = np.cumsum(lengths)
        most = sum(windows_to_cover(starts, self.block_size) for starts in lengths)
        starts = evenly_spaced(int(ends[-1]), min(count, most))
        shard = np.searchsorted(ends, starts, side="right")
        starts -= np.concatenate(([0], ends))[shard]
        for i in range(0, len(starts), self.batch_size):
            rows = slice(i, i + self.batch_size)
            yield self._gather(shard[rows], starts[rows]), len(starts[rows])

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {
            "samples": self.samples,
            "seed": self.seed,
            "order": self.order,
            "block_size": self.block_size,
            "tokens": self.data.tokens,
            "tokenizer": self.data.fingerprint,
            "digest": self.data.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; ValueError where it belongs to other data, seed, order or block size."""
        mine = self.state_dict()
        check_position({"digest": mine["digest"], **state}, mine)  # an older state has no digest
        self.samples = state["samples"]

    def _locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and start of each sample number (uint64)."""
        n = np.uint64(self._ends[-1])
        if self.order == "random":
            window = (_mix(samples, self.seed) % n).astype(np.int64)
            shard = np.searchsorted(self._ends, window, side="right")
            return shard, window - (self._ends - self._counts)[shard]
        epoch, position = samples // n, samples % n
        window = np.empty(len(samples), dtype=np.int64)
        offset = np.empty(len(samples), dtype=np.int64)
        shard = np.empty(len(samples), dtype=np.int64)
        for e in np.unique(epoch):  # one, seldom two epochs in a batch
            key = int(_mix(np.array([e]), self.seed)[0])
            here = epoch == e
            window[here] = permute(position[here], int(n), key)
            shard[here] = np.searchsorted(self._ends, window[here], side="right")
            offset[here] = np.uint64(key) % self._slack[shard[here]].astype(np.uint64)
        return shard, (window - (self._ends - self._counts)[shard]) * self.block_size + offset

    def _gather(self, shard: np.ndarray, start: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._windows) == 1:
            rows = self._windows[0][start]  # (B, T + 1), one gather from the memory map
        else:
            rows = np.empty((len(start), self.block_size + 1), dtype=self._windows[0].dtype)
            for s in np.unique(shard):
                rows[shard == s] = self._windows[s][start[shard == s]]
        self.data.check_read(rows)
        return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """`count` of the numbers below `total` at even distances, all where there are not so many: int64, ascending."""
    return np.linspace(0, total - 1, min(count, total)).astype(np.int64)


def windows_to_cover(starts: int, length: int) -> int:
    """The fewest windows of `length` tokens that cover a text in which a window can begin at `starts` places."""
    return 1 + -(-(starts - 1) // length)


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A pseudo-random permutation of range(n) without a table: a 4-round Feistel network over the next even power of
    two, walked until the value falls below n (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        index: uint64, each below n.
        key: chooses the permutation.

    Returns:
        int64, the image of each index.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    value = np.asarray(index, dtype=np.uint64).copy()
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix(right, key + round_number) & mask)
        value[outside] = left << half | right
        outside = value >= np.uint64(n)
    return value.astype(np.int64)


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """splitmix64 (Steele, Lea & Flood 2014) of values (uint64) under a key: 64 well-mixed bits each."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(scramble(key))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def scramble(key: int) -> int:
    """64 well-mixed bits of a number (splitmix64's finaliser)."""
    z = (key + 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return z ^ (z >> 27)
