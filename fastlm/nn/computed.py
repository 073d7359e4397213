"""A constant tensor that a module computes from its own settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Computed(nn.Module):
    """A float32 constant that follows its module from device to device but is neither saved nor rounded.

    An ordinary buffer would be rounded by `model.bfloat16()` (rotary frequencies then point elsewhere) and left
    uninitialised by `allocate`. This one is computed again instead.
    """

    value: Tensor

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        self._compute = compute
        self.register_buffer("value", self._on(torch.get_default_device()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        device = self.value.device
        if device.type != "meta":
            self.value = self._on(device)
        return self

    def _on(self, device: torch.device) -> Tensor:
        with torch.device("cpu"):  # the same numbers on every device
            return self._compute().to(device)
