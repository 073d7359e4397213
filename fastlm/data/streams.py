"""Streams for recurrent models: rows that go through the text side by side, so that a state can be carried along.

The text is cut into as many equal parts as there are rows; window after window, each row reads its part. Where a window
lies is a function of its number alone, as in `WindowLoader`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastlm.data.batches import Batch, check_position
from fastlm.data.loader import TokenData, evenly_spaced, windows_to_cover

EVALUATION_WINDOWS = 4  # an evaluation reads so many windows in a row, for it begins with an empty state


class StreamLoader:
    """Batches (x, y) of consecutive windows, and which stream they continue.

    Args:
        batch_size: rows of one batch.
        block_size: tokens of a window.
        accumulation: batches of one optimizer step; each goes on with rows of its own.
        rank, world_size: the rows are shared out over the processes.

    Raises:
        ValueError: a row's part of the text is shorter than one window.
    """

    def __init__(
        self,
        data: TokenData,
        batch_size: int,
        block_size: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.data, self.batch_size, self.block_size = data, batch_size, block_size
        self.rank, self.world_size = rank, world_size
        self.rows = batch_size * accumulation * world_size  # of all processes together
        self.samples = 0  # windows taken so far by all processes together
        self._ends = np.cumsum([len(a) for a in data.arrays])
        self._part = (int(self._ends[-1]) - 1) // self.rows  # tokens of a row
        self._windows = self._part // block_size
        if self._windows < 1:
            raise ValueError(
                f"the text is too short: {int(self._ends[-1]):,} tokens are {self._part:,} for each of {self.rows} "
                f"rows, a window of block_size={block_size} needs {block_size + 1:,}"
            )

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text that one id stands for."""
        return self.data.bytes_per_token

    def next_batch(self) -> dict[str, Any]:
        """x, y: int64 (batch_size, block_size), on the CPU; stream: which of this process's streams they go on with;
        fresh: whether they begin it, at the start of a pass over the text."""
        first = self.samples + self.rank * self.batch_size
        self.samples += self.world_size * self.batch_size
        window, row = first // self.rows % self._windows, first % self.rows
        starts = [(row + i) * self._part + window * self.block_size for i in range(self.batch_size)]
        x, y = self._read(starts, self.block_size)
        return {"x": x, "y": y, "stream": row // (self.batch_size * self.world_size), "fresh": window == 0}

    def weight(self, batch: Batch) -> None:
        """None: every token is a target, and the batches are of one size."""

    def evaluation_batches(self, count: int) -> Iterator[tuple[dict[str, Any], int]]:
        """About `count` windows at even distances, several in a row, but no more than cover the text; in batches, each
        with its weight in the mean loss (its pieces)."""
        total = int(self._ends[-1]) - 1
        length = min(EVALUATION_WINDOWS * self.block_size, total)
        places = total - length + 1
        pieces = min(max(1, count // EVALUATION_WINDOWS), windows_to_cover(places, length))
        starts = evenly_spaced(places, pieces).tolist()
        for i in range(0, len(starts), self.batch_size):
            x, y = self._read(starts[i : i + self.batch_size], length)
            yield {"x": x, "y": y, "stream": None, "fresh": True}, len(x)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {
            "samples": self.samples,
            "rows": self.rows,
            "block_size": self.block_size,
            "tokens": self.data.tokens,
            "tokenizer": self.data.fingerprint,
            "digest": self.data.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; ValueError where it belongs to other data or another number of rows."""
        mine = self.state_dict()
        check_position({"digest": mine["digest"], **state}, mine)  # an older state has no digest
        self.samples = state["samples"]

    def _read(self, starts: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.stack([self._tokens(start, length + 1) for start in starts]).astype(np.int64)
        self.data.check_read(rows)
        both = torch.from_numpy(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def _tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens of the shards as one text."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        parts, left = [], count
        while left:
            begin = start - (int(self._ends[shard]) - len(self.data.arrays[shard]))
            part = self.data.arrays[shard][begin : begin + left]
            parts.append(part)
            left, start, shard = left - len(part), start + len(part), shard + 1
        return np.concatenate(parts)
