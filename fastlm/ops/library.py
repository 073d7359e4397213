"""The torch.library namespace `fastlm`: every raw op is defined here, with its schema and its fake.

An op is `define`d with one Python implementation for all devices (the chosen backend is an argument of the op) and a
fake that gives shapes and dtypes. Autograd is not registered with the library: one `autograd.Function` stands outside
each pair of raw ops, which costs a third of what `custom_op` with `register_autograd` costs per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fastlm", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> Any:
    """Define `fastlm::<schema>` and return the overload to call."""
    name = schema.partition("(")[0]
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastlm, name).default
