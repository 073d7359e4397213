"""Which backends there are, what each supports, and which one runs a call.

A backend of an op is a module with the raw functions of that op (mostly `forward` and `backward`; the optimizer has
`step`) and with `unsupported(*call)`: None where it can run the call, else the reason why not, in a few words.
Everything else of the op (contract, autograd, schema, fake) stands once, in the op's own `__init__.py`.

    with fastlm.backend("reference"):       # or FASTLM_BACKEND=reference
        y = fastlm.ops.layer_norm(x, weight)

A backend that is asked for by name runs the call or raises `UnsupportedError` with the reason. Without a name ("auto")
the first of the device's list that supports the call runs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fastlm.hints import did_you_mean


class UnsupportedError(RuntimeError):
    """The backend that was asked for cannot run this call. The message says why."""


# The order in which `auto` tries the backends on each type of device. `reference` runs everywhere and always.
AUTO_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
NAMES = ["cuda", "triton", "cpu", "reference"]
_DEVICE_TYPE = {"cuda": "cuda", "cpu": "cpu"}  # the device that a backend's tensors must be on; others: any

FORCED = "FASTLM_CPU_ISA="  # so begins the reason why the instruction set that this variable names cannot be had

_ops: dict[str, dict[str, ModuleType | Any]] = {}
_prepare: dict[str, Callable[..., tuple]] = {}
_availability: dict[str, Callable[[], str | None]] = {}


def register(op: str, prepare: Callable[..., tuple], **backends: ModuleType | Any) -> None:
    """Make an op known. `prepare` takes the public function's arguments, checks them and returns the raw call's."""
    _ops[op] = dict(backends)
    _prepare[op] = prepare


def register_backend(name: str, available: Callable[[], str | None], device_type: str | None = None) -> None:
    """Make a further backend known (the tests add the CUDA emulator). `available` gives None or the reason why not."""
    if name not in NAMES:
        NAMES.append(name)
    _availability[name] = available
    if device_type is not None:
        _DEVICE_TYPE[name] = device_type


def register_implementation(op: str, name: str, module: ModuleType | Any) -> None:
    """Give an op one more backend."""
    _ops[op][name] = module


def implementation(op: str, name: str) -> Any:
    """The module that runs `op` on the backend `name`."""
    return _ops[op][name]


def _known(name: str) -> str:
    if name not in NAMES and name != "auto":
        hint = did_you_mean(name, [*NAMES, "auto"])
        raise ValueError(f"there is no backend {name!r}{hint}; the backends are: auto, {', '.join(NAMES)}")
    return name


# A plain global, as torch's own backend flags are: it costs nothing to read, and torch.compile guards on it.
_forced: str = os.environ.get("FASTLM_BACKEND", "auto") or "auto"


def check_environment() -> None:
    """ValueError where FASTLM_BACKEND names no backend. The first op says so, and every command before it begins: an
    error of the import itself could only be a traceback."""
    if _forced not in NAMES and _forced != "auto":  # `backend` lets no such name in
        hint = did_you_mean(_forced, [*NAMES, "auto"])
        raise ValueError(f"FASTLM_BACKEND={_forced!r}: there is no such backend{hint}; use auto, {', '.join(NAMES)}")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend: "cuda", "triton", "cpu", "reference", or "auto".

    The backward pass of a call runs on the backend that its forward ran on, also outside the block. The setting is
    process-wide, as torch's backend flags are.

    Raises:
        ValueError: there is no backend of this name.
        UnsupportedError: (from an op inside the block) the backend cannot run that call.
    """
    global _forced
    previous = _forced
    _forced = _known(name)
    try:
        yield
    finally:
        _forced = previous


def may_run(name: str) -> bool:
    """Whether `backend` leaves the choice open, or is this one."""
    return _forced in ("auto", name)


def unavailable(name: str) -> str | None:
    """None where the backend can run at all on this machine, else the reason why not."""
    check = _availability.get(name)
    return check() if check is not None else None


# What torch.compiler.assume_constant_result sets. Calling it would import the whole compiler at every start: a second.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not(op: str, name: str, device_type: str, call: tuple) -> str | None:
    """None where the backend can run this call, else the reason why not."""
    module = _ops[op].get(name)
    if module is None:
        return f"fastlm has no {name} kernel for {op} yet"
    wanted = _DEVICE_TYPE.get(name)
    if wanted is not None and wanted != device_type:
        return f"it runs on {wanted} tensors, and these are on {device_type}"
    return unavailable(name) or module.unsupported(*call)


def choose(op: str, device_type: str, call: tuple) -> str:
    """The name of the backend that runs `op` on this raw call; UnsupportedError where a forced one cannot."""
    if _forced != "auto":
        reason = _why_not(op, _forced, device_type, call)
        if reason is not None:
            check_environment()
            raise UnsupportedError(f"backend {_forced!r} cannot run {op} here: {reason}")
        return _forced
    for name in AUTO_ORDER.get(device_type, ("reference",)):
        reason = _why_not(op, name, device_type, call)
        if reason is None:
            return name
        if reason.startswith(FORCED):  # an order that cannot be obeyed
            raise UnsupportedError(reason)
    raise UnsupportedError(f"no backend can run {op} on {device_type} tensors: {explain_call(op, device_type, call)}")


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, and for each other one why it does not."""

    op: str
    chosen: str | None
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend'}"]
        for name, reason in self.reasons.items():
            note = "runs this call" if name == self.chosen else reason or "could run it; another comes first"
            lines.append(f"  {name:<10} {note}")
        return "\n".join(lines)


def explain_call(op: str, device_type: str, call: tuple) -> Explanation:
    check_environment()
    reasons = {name: _why_not(op, name, device_type, call) for name in NAMES}
    order = AUTO_ORDER.get(device_type, ("reference",)) if _forced == "auto" else (_forced,)
    chosen = next((name for name in order if reasons[name] is None), None)
    return Explanation(op, chosen, reasons)


def explain(op: str | Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run a call, and why the others would not. The arguments are those of the op itself.

    >>> print(fastlm.ops.explain("layer_norm", x, weight, bias))
    layer_norm: cpu
      cuda       it runs on cuda tensors, and these are on cpu
      ...
    """
    name = op if isinstance(op, str) else op.__name__.rstrip("_")  # adamw_ works in place, and says so
    if name not in _prepare:
        hint = did_you_mean(name, _prepare)
        raise ValueError(f"there is no op {name!r}{hint}; the ops are: {', '.join(_prepare)}")
    call = _prepare[name](*args, **kwargs)
    tensors = (t for part in call for t in (part if isinstance(part, (list, tuple)) else (part,)))
    device = next(t.device.type for t in tensors if isinstance(t, torch.Tensor))
    return explain_call(name, device, call)


def table() -> dict[str, dict[str, str | None]]:
    """op -> backend -> None where it is available on this machine, else the reason why not."""
    return {
        op: {
            name: (unavailable(name) if name in modules else f"fastlm has no {name} kernel for {op} yet")
            for name in NAMES
        }
        for op, modules in _ops.items()
    }


def implementations() -> dict[str, dict[str, Any]]:
    """op -> backend -> the module that runs it, on whatever machine."""
    return {op: dict(modules) for op, modules in _ops.items()}
