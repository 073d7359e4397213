"""Modules whose weights come later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, modules are made on the meta device: they have shapes, but no memory, and nothing is drawn for it."""
    with torch.device("meta"), _NothingDrawn():
        yield


def allocate(model: Model, device: torch.device | str) -> Model:
    """Give a model made `without_weights` memory for them, uninitialised.

    It is torch.nn.Module.to_empty, which would import sympy (0.4 s).
    """
    return model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))


class _NothingDrawn(TorchFunctionMode):
    """On the meta device normal_ does nothing, and imports torch._dynamo for it: 1.6 s and 140 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)
