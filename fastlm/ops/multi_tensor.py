"""Ops on many tensors in one launch: their addresses and sizes as a table on the device."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

CHUNK = 4096  # elements that a block works on: csrc/optimizer/chunks.h
KEPT_TABLES = 16  # a step has a table for each group and each norm; the addresses stay the same from step to step
_tables: OrderedDict[tuple[torch.device, int, bytes], tuple[Tensor, Tensor]] = OrderedDict()
_captured: list[tuple[Tensor, Tensor]] = []  # every replay of a CUDA graph copies its tables again: they live on


def chunks_of(numel: int) -> int:
    return -(-numel // CHUNK)


def on_device(table: bytes, device: torch.device) -> Tensor:
    """The table of int64 in the device's memory. The copy waits for nothing, and is kept for the stream's next call."""
    if device.type != "cuda":
        return _tensor(table)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            _captured.append(_upload(table, device))
            return _captured[-1][1]
        key = (device, torch.cuda.current_stream(device).cuda_stream, table)
    if key in _tables:
        _tables.move_to_end(key)
    else:
        _tables[key] = _upload(table, device)
        while len(_tables) > KEPT_TABLES:
            _tables.popitem(last=False)
    return _tables[key][1]


def _tensor(table: bytes) -> Tensor:
    if not table:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(bytearray(table), dtype=torch.int64)


def _upload(table: bytes, device: torch.device) -> tuple[Tensor, Tensor]:
    """The table in pinned memory, and its copy on the device."""
    host = _tensor(table).pin_memory()
    return host, host.to(device, non_blocking=True)
