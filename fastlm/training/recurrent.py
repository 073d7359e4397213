"""Truncated backpropagation through time: the state is carried from window to window, the gradient is not.

Williams, Peng: An efficient gradient-based algorithm for on-line training of recurrent network trajectories (1990).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Hidden = tuple[Tensor, Tensor]


class HiddenStates:
    """The states of a recurrent model's streams, between one window and the next."""

    def __init__(self) -> None:
        self._held: dict[int, Hidden] = {}

    def loss(self, forward: Callable[..., Any], x: Tensor, y: Tensor, stream: int | None, fresh: bool) -> Tensor:
        """The loss of the windows, which go on with the stream's state (detached) and leave it theirs.

        Args:
            forward: `LSTMLM.forward`.
            stream: None: from an empty state, and nothing is kept (an evaluation).
            fresh: begin the stream anew.
        """
        before = None if stream is None or fresh else self._held.get(stream)
        loss, after = forward(x, before, targets=y)
        if stream is not None:
            self._held[stream] = tuple(t.detach() for t in after)  # type: ignore[assignment]
        return loss

    def state_dict(self) -> dict[int, Hidden]:
        """The states by stream."""
        return dict(self._held)

    def load_state_dict(
        self, saved: list[dict[int, Hidden]], batch_size: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        """Go on with the states of all processes, saved by rank; this one takes those of its rows.

        As `StreamLoader` numbers the rows, a stream of all processes comes after the other, and within it rank after
        rank: so they can be shared out over another number of processes, or of batches in a step.
        """
        batches = [state[stream] for stream in sorted(saved[0]) for state in saved]
        if batches:
            h, c = (torch.cat(part, 1).split(batch_size, 1) for part in zip(*batches, strict=True))
            batches = list(zip(h, c, strict=True))
        mine = batches[rank::world_size]
        self._held = {
            stream: (h.contiguous().to(device), c.contiguous().to(device)) for stream, (h, c) in enumerate(mine)
        }
