"""Ops on many tensors in one launch: their addresses and sizes as a table on the device."""

from __future__ import annotations

from array import array
from collections import OrderedDict

import torch
from torch import Tensor

CHUNK = 4096  # elements that a block works on: csrc/optimizer/chunks.h
KEPT_TABLES = 16  # a step has a table for each group and each norm; the addresses stay the same from step to step
_tables: OrderedDict[tuple[torch.device, bytes], Tensor] = OrderedDict()


def chunks_of(numel: int) -> int:
    return -(-numel // CHUNK)


def on_device(table: array, device: torch.device) -> Tensor:
    """The table of int64 in the device's memory. The copy waits for nothing, and is kept for the next call."""
    key = (device, table.tobytes())
    held = _tables.get(key)
    if held is None:
        host = torch.tensor(table, dtype=torch.int64)
        held = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
        _tables[key] = held
        while len(_tables) > KEPT_TABLES:
            _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    return held
