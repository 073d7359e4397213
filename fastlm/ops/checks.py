"""Checks that the contracts of several ops share. Every message says what was got and what was wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad

PLAIN = (Tensor, torch.nn.Parameter)  # a tensor of another class may have its numbers elsewhere, or none
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(op: str, **tensors: Tensor | None) -> None:
    """Every tensor is of a floating dtype that the ops know."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {t.dtype}")


def same_device(op: str, first: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Every tensor is on the device of `x`, whose name is `first`."""
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, but {first} is on {x.device}; they must be on one device")


def same_dtype(op: str, first: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Every tensor has the dtype of `x`, whose name is `first`."""
    for name, t in tensors.items():
        if t is not None and t.dtype != x.dtype:
            raise ValueError(f"{op}: {name} is {t.dtype}, but {first} is {x.dtype}; they must have one dtype")


def alike(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether every tensor has the dtype and the device of `x`. Asked first, it spares the checks that word errors."""
    dtype, device = x.dtype, x.device
    return all([t is None or (t.dtype == dtype and t.device == device) for t in tensors])


def shape(op: str, name: str, t: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    """`t` has the shape `wanted`, spelled out in letters by `meaning`."""
    if t.shape != wanted:
        raise ValueError(f"{op}: {name} must have shape {meaning} = {tuple(wanted)}, got {tuple(t.shape)}")


def linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "", gated: bool = False) -> None:
    """The contract of x @ weight.T + bias. Plain conditions stand in front of the checks that word the errors: a call
    of one costs as much as a small product."""
    name, bias_name = f"{prefix}weight", f"{prefix}bias"
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: {name} must have shape ({'2F' if gated else 'F'}, C), C = {x.shape[-1]} as in x of shape"
            f" {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"{op}: {name} must not be empty, got shape {tuple(weight.shape)}")
    if gated and weight.shape[0] % 2:
        raise ValueError(f"{op}: {name} of a gated activation must have an even number of rows, got {weight.shape[0]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        shape(op, bias_name, bias, (weight.shape[0],), "(2F)" if gated else "(F)")
    if x.dtype not in FLOATS or not alike(x, weight, bias):
        tensors = {name: weight, bias_name: bias}
        floating(op, x=x, **tensors)
        same_device(op, "x", x, **tensors)
        same_dtype(op, "x", x, **tensors)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums and statistics are taken: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is, for devices of this type. Of meta tensors torch does not know the question."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(x: Tensor, *tensors: Tensor | None) -> list[Any]:
    """The tensors in the autocast dtype of x's device, as torch's matrix products take them; else unchanged."""
    return _autocast(lambda t, dtype: t.to(dtype), x, *tensors)


def refuse_tangents(op: str, *arguments: Any) -> None:
    """Raise NotImplementedError where an argument carries a tangent of forward-mode autograd.

    The dispatcher would give results without one, which reads as a derivative of zero. (Where a graph is recorded,
    torch raises the error.)
    """
    if _forward_ad._current_level < 0:
        return
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and _forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative (jvp), and got a tensor with a tangent; wanted reverse mode, "
                "torch.autograd.grad or backward()"
            )


def detached(op: str, *tensors: Tensor | None) -> list[Any]:
    """The tensors without their history, for an autograd.Function that gets the originals too."""
    refuse_tangents(op, *tensors)  # detach would drop them
    return [None if t is None else t.detach() for t in tensors]


def autocast_detached(op: str, x: Tensor, *tensors: Tensor | None) -> list[Any]:
    """As `autocast`, for an autograd.Function that gets the originals too: what is cast has no history."""
    refuse_tangents(op, x, *tensors)  # detach would drop them
    return _autocast(lambda t, dtype: t.detach().to(dtype), x, *tensors)


def _autocast(cast: Callable[[Tensor, torch.dtype], Tensor], x: Tensor, *tensors: Tensor | None) -> list[Any]:
    kind = x.device.type
    if not autocast_is_on(kind):
        return [x, *tensors]
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or t.dtype in (dtype, torch.float64) else cast(t, dtype) for t in (x, *tensors)]


class _AutocastOff:
    """torch.autocast(kind, enabled=False), at a sixth of its cost: it leaves the cache of casts alone."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self.kind, True)


_NOTHING = nullcontext()


def autocast_off(x: Tensor) -> AbstractContextManager:
    """Inside it, autocast leaves matrix products alone: a raw op computes in the dtypes that it was given."""
    kind = x.device.type
    return _AutocastOff(kind) if autocast_is_on(kind) else _NOTHING
