"""Several processes, started by `torchrun … -m fastlm train`: each takes its part of every batch (DDP, FSDP2)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this is. With one process every method is free and changes nothing."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the log and the checkpoints."""
        return self.rank == 0

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module whose backward pass averages the gradients over the processes."""
        if self.world_size == 1:
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def not_yet_averaging(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Within it, a backward pass only accumulates gradients on this process."""
        return contextlib.nullcontext() if self.world_size == 1 else model.no_sync()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over the processes, on each of them."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def sum(self, *values: float) -> list[float]:
        """The sums over the processes, on each of them."""
        if self.world_size == 1:
            return list(values)
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def largest(self, value: int) -> int:
        """The largest value that a process has, on each of them: how all of them agree to stop."""
        return value if self.world_size == 1 else max(self.gather(value))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, on each of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all the others."""
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[Processes, str]]:
    """The processes that torchrun started (one, without torchrun), and the device of this one.

    "auto" and "cuda" become the GPU of this process's local rank. GPUs talk through NCCL, CPUs through Gloo.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes(), device
        return
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()  # a program that has its own process group keeps it
    if ours:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(dist.get_rank(), world_size), device
    finally:
        if ours:
            dist.destroy_process_group()
