"""What a loader of training batches is, for the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

# (x, y), or, where sequences of different lengths are packed into one row, (x, y, cu_seqlens, max_seqlen): the
# arguments of a model's forward. The trainer calls `_, loss = model(x, y, cu_seqlens=…, max_seqlen=…)`.
# Other arguments come by name, x and y among them: {"x": …, "y": …, "source": …}.
Batch = tuple[Any, ...] | dict[str, Any]


class Loader(Protocol):
    """Where the trainer takes its batches from. Everything random is a function of the seed and `samples`."""

    batch_size: int
    block_size: int  # tokens in the longest sequence

    @property
    def samples(self) -> int:
        """Taken so far by all processes together."""
        ...

    @property
    def bytes_per_token(self) -> float | None:
        """Of the text: turns the loss into bits per byte. None where the loss is not that of a text."""
        ...

    def next_batch(self) -> Batch:
        """The next one of this process, on the CPU."""
        ...

    def weight(self, batch: Batch) -> float | None:
        """What the batch's loss counts in the mean over several: how many targets it is the mean of, say. None: all
        batches for training count the same."""
        ...

    def evaluation_batches(self, count: int) -> Iterator[tuple[Batch, float]]:
        """Up to `count` fixed samples in batches, each with its weight in the mean loss; `samples` does not move."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken; ValueError where it belongs to other data."""
        ...


def check_position(saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """ValueError where the saved state of a loader is not of the data of `mine`: all but `samples` must agree."""
    for key in mine:
        if key != "samples" and saved.get(key) != mine[key]:
            raise ValueError(
                f"the saved data position has {key}={saved.get(key)!r}, this loader {mine[key]!r}: not the same data"
            )


def forward_arguments(batch: Batch, device: torch.device) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The positional and named arguments of a model's forward, on its device."""
    if isinstance(batch, dict):
        moved = {name: _to_device(part, device) for name, part in batch.items()}
        return (moved.pop("x"), moved.pop("y")), moved
    x, y, *packing = (_to_device(part, device) for part in batch)
    return (x, y), dict(zip(("cu_seqlens", "max_seqlen"), packing, strict=False))


def _to_device(part: Any, device: torch.device) -> Any:
    if not isinstance(part, torch.Tensor) or device.type != "cuda":
        return part
    return part.pin_memory().to(device, non_blocking=True)
