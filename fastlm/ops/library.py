"""The torch.library namespace `fastlm`: every raw op is defined here, with its schema and its fake.

An op is `define`d with one Python implementation for all devices (the chosen backend is an argument of the op) and a
fake that gives shapes and dtypes. Autograd is not registered with the library: one `autograd.Function` stands outside
each pair of raw ops, which costs a third of what `custom_op` with `register_autograd` costs per call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fastlm", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> Any:
    """Define `fastlm::<schema>` and return the overload to call."""
    name = schema.partition("(")[0]
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, _on_their_device(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastlm, name).default


def _on_their_device(implementation: Callable) -> Callable:
    """Make the tensors' GPU the current one for the call: kernels are launched on, and allocate on, the current device."""

    @functools.wraps(implementation)
    def run(*arguments: Any) -> Any:
        first = arguments[0]
        if first is None:
            first = next(a for a in arguments if isinstance(a, torch.Tensor))
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return implementation(*arguments)
        return implementation(*arguments)

    return run
