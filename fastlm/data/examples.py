"""Batches of labelled sequences of different lengths, packed into one row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastlm.data.batches import Batch, check_position
from fastlm.data.loader import evenly_spaced, permute, scramble


class ExampleLoader:
    """Batches (x, y, cu_seqlens, max_seqlen): x (1, T) int64 packed, y (N) int64 the sequences' labels.

    Every example comes once an epoch, in another order each time. As in `WindowLoader`, a batch is a function of the
    seed and the sample number.

    Args:
        sequences: ids of each example; none is empty.
        batch_size: N, on this process.
        rank, world_size: this process takes every world_size-th batch.
        class_weights: those of the model's loss (see `weight`).
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        labels: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        class_weights: Sequence[float] | None = None,
    ):
        if len(sequences) != len(labels) or not sequences:
            raise ValueError(f"wanted as many labels as sequences, and some; got {len(sequences)} and {len(labels)}")
        self.sequences = [torch.as_tensor(np.asarray(ids, dtype=np.int64)) for ids in sequences]
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)
        self.block_size = max(len(ids) for ids in self.sequences)
        self.samples = 0
        self.samples_per_epoch, self.samples_per_batch = len(self.sequences), batch_size
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        for ids in self.sequences:
            digest.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
        self._digest = digest.hexdigest()

    @property
    def bytes_per_token(self) -> float | None:
        """None: the loss is that of the labels."""
        return None

    def next_batch(self) -> Batch:
        """The next batch of this process."""
        first = self.samples + self.rank * self.batch_size
        self.samples += self.world_size * self.batch_size
        return self._batch([self._example(first + i) for i in range(self.batch_size)])

    def weight(self, batch: Batch) -> float | None:
        """With class weights the sum of the examples': by that the loss of a batch is divided."""
        if self.class_weights is None:
            return None
        assert not isinstance(batch, dict)
        return self.class_weights[batch[1]].sum().item()

    def evaluation_batches(self, count: int) -> Iterator[tuple[Batch, float]]:
        """`count` examples at even distances, in their order, in batches with their weights or else their sizes."""
        numbers = evenly_spaced(len(self.sequences), count).tolist()
        for i in range(0, len(numbers), self.batch_size):
            rows = numbers[i : i + self.batch_size]
            batch = self._batch(rows)
            weight = self.weight(batch)
            yield batch, len(rows) if weight is None else weight

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {
            "samples": self.samples,
            "seed": self.seed,
            "examples": len(self.sequences),
            "digest": self._digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken; ValueError where it belongs to other examples or another seed."""
        check_position(state, self.state_dict())
        self.samples = state["samples"]

    def _example(self, sample: int) -> int:
        """Which example a sample number is."""
        epoch, place = divmod(sample, len(self.sequences))
        key = scramble(scramble(self.seed) ^ epoch)
        return int(permute(np.array([place], dtype=np.uint64), len(self.sequences), key)[0])

    def _batch(self, rows: list[int]) -> Batch:
        packed, cu_seqlens, longest = pack([self.sequences[row] for row in rows])
        return packed, self.labels[rows], cu_seqlens, longest


def pack(sequences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Sequences one after the other: (1, T) int64, where they start (N + 1) int32, and the longest's length."""
    lengths = torch.tensor([0, *(len(ids) for ids in sequences)])
    return torch.cat(list(sequences))[None], lengths.cumsum(0).to(torch.int32), int(lengths.max())
