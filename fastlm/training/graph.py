"""Forward and backward pass of a batch as a CUDA graph: recorded once, replayed with every further batch.

Launched from Python, the kernels of a small model's pass, or of a small batch's, take less time than it takes to launch
them. A graph holds addresses: batches are copied to where the first one lay, and gradients come where the first ones
did.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.ops import graphs

WARM_UP = 3  # passes before the recording: kernels are loaded, libraries choose theirs and allocate their workspaces


class RecordedPass:
    """Calls `compute`, or replays what it did before.

    >>> def compute(idx, targets):
    ...     with torch.autocast("cuda", torch.bfloat16):
    ...         _, loss = model(idx, targets)
    ...     loss.backward()
    ...     return loss
    >>> run = RecordedPass(compute, model.parameters())
    >>> for idx, targets in batches:
    ...     optimizer.zero_grad()
    ...     loss = run(idx, targets)
    ...     optimizer.step()

    There are two graphs: one makes the gradients anew, the other adds to them (gradient accumulation). The first is
    recorded when all gradients are None, as `zero_grad()` leaves them unless it is told to keep them. Batches of
    another shape than the first, and parameters whose gradients are others than the graph's, take the direct way; where
    no graph can be recorded (there is not memory enough, say), everything does, and a warning says why. On a CPU there
    is nothing to record: every pass is direct.

    What `compute` did is repeated as it was: after a change of the model (frozen parameters, another dropout rate,
    evaluation mode) make a new one.

    Args:
        compute: from a batch's tensors to the loss, the backward pass included; it must wait for nothing on the GPU.
        parameters: those whose gradients it makes.
    """

    def __init__(self, compute: Callable[..., Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self.compute = compute
        self.parameters = [p for p in parameters if p.requires_grad]
        self._direct_passes = WARM_UP  # how many are still to come; infinite: no graph is possible
        self._batch: tuple[Tensor, ...] = ()  # what the graphs read
        self._gradients: list[Tensor | None] = []  # what they write
        self._graphs: dict[bool, tuple[Any, Tensor]] = {}  # with the loss, by whether the gradients are made anew

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss, detached, which the next replay writes over. The gradients are added to the parameters'."""
        anew = all(p.grad is None for p in self.parameters)
        if not self._replayable(anew, batch):
            self._direct_passes -= 1
            return self.compute(*batch).detach()
        if anew not in self._graphs:
            try:
                self._record(anew, batch)
            except RuntimeError as error:  # no memory for it, or something in the pass waits for the GPU
                warnings.warn(f"passes are launched kernel by kernel, without a CUDA graph: {error}", stacklevel=2)
                self._direct_passes = 2**63
                for p, grad in zip(self.parameters, self._gradients or [None] * len(self.parameters), strict=True):
                    p.grad = None if anew else grad
                return self.compute(*batch).detach()
        for held, new in zip(self._batch, batch, strict=True):
            held.copy_(new)
        graph, loss = self._graphs[anew]
        graph.replay()
        if anew:
            for p, grad in zip(self.parameters, self._gradients, strict=True):
                p.grad = grad
        return loss

    def _replayable(self, anew: bool, batch: tuple[Tensor, ...]) -> bool:
        if self._direct_passes > 0 or not graphs.possible(batch[0].device):
            return False
        if not self._graphs:
            return anew
        if not anew and any(p.grad is not grad for p, grad in zip(self.parameters, self._gradients, strict=True)):
            return False
        return all(
            held.shape == new.shape and held.dtype == new.dtype for held, new in zip(self._batch, batch, strict=True)
        )

    def _record(self, anew: bool, batch: tuple[Tensor, ...]) -> None:
        """Makes the graph; nothing of it has run then."""
        device = batch[0].device
        if anew:
            self._batch = tuple(t.clone() for t in batch)
            torch.cuda.empty_cache()  # the graph has memory of its own: what the passes so far have used goes back
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
        self._graphs[anew] = graphs.record(lambda: self.compute(*self._batch).detach(), device, pool)
        if anew:
            self._gradients = [p.grad for p in self.parameters]
