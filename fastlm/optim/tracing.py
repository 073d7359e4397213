"""torch.optim.Optimizer without loading torch.compile's machinery, where nobody compiles.

PyTorch keeps the methods of an optimizer out of compiled graphs by a guard that imports torch._dynamo when it is first
called: 1.6 s and 140 MB of every training run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fastlm.ops.library import compiler_is_loaded


def base_method(optimizer: torch.optim.Optimizer, name: str) -> Callable:
    """The method of torch.optim.Optimizer, without its guard where torch._dynamo is not there."""
    method = getattr(torch.optim.Optimizer, name)
    if not compiler_is_loaded():
        method = getattr(method, "__wrapped__", method)
    return functools.partial(method, optimizer)
