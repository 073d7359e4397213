"""torch.optim.Optimizer without loading torch.compile's machinery, where nobody compiles.

PyTorch keeps the methods of an optimizer out of compiled graphs by a guard that imports torch._dynamo when it is first
called: 1.6 s and 140 MB of every training run. Who has not imported that cannot be tracing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def untraced(method: Callable) -> Callable:
    """torch.compiler.disable, where torch._dynamo is there."""

    guarded = torch._disable_dynamo(method)  # torch.compiler.disable would import it here and now

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (guarded if _compiler_is_loaded() else method)(*args, **kwargs)

    return call


def base_method(optimizer: torch.optim.Optimizer, name: str) -> Callable:
    """The method of torch.optim.Optimizer, without its guard where torch._dynamo is not there."""
    method = getattr(torch.optim.Optimizer, name)
    if not _compiler_is_loaded():
        method = getattr(method, "__wrapped__", method)
    return functools.partial(method, optimizer)


def _compiler_is_loaded() -> bool:
    return "torch._dynamo" in sys.modules
