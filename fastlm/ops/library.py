"""The torch.library namespace `fastlm`: every raw op is defined here, with its schema and its fake.

An op is `define`d with one Python implementation for all devices (the chosen backend is an argument of the op) and a
fake that gives shapes and dtypes. Its derivative is not registered with the library: one `autograd.Function` stands
outside each pair of raw ops, which costs a third of what `custom_op` with `register_autograd` costs per call. What is
registered is that there is none, of the forward ops: it makes a call through the dispatcher 8 µs longer.

PyTorch's dispatcher is there for whoever looks at calls from outside: compilers, tracers, tensor subclasses, functorch,
profilers. A way through it and back into Python costs about 10 µs, more than a small kernel. In plain eager mode, with
nobody looking, a raw op is therefore an ordinary function call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import unwrap_if_dead as _unwrap_if_dead
from torch.autograd import forward_ad as _forward_ad
from torch.autograd import profiler as _profiler
from torch.compiler import is_dynamo_compiling as _is_dynamo_compiling

from fastlm.ops import checks

LIBRARY = torch.library.Library("fastlm", "DEF")

# What the arguments of a plain eager call are; a subclass of Tensor wants to see the call itself.
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), torch.dtype, float, int, bool, str, list}  # lists: of flags


def watched() -> bool:
    """Whether somebody looks at calls from outside, and raw ops therefore go through the dispatcher."""
    return (
        _is_dynamo_compiling()
        or _get_tracing_state() is not None  # torch.jit.trace
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()  # vmap, grad
        or _profiler._is_profiler_enabled
        or _forward_ad._current_level >= 0
    )


def transformed() -> bool:
    """Whether somebody makes something else of what is called, and needs calls that he knows: a graph, a batch."""
    return _len_torch_dispatch_stack() > 0 or _are_functorch_transforms_active() or _get_tracing_state() is not None


def define(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Define `fastlm::<schema>` and return what to call."""
    name = schema.partition("(")[0]
    tags = (torch.Tag.pt2_compliant_tag,)
    on_their_device = _on_their_device(implementation)
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, on_their_device, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", fake, lib=LIBRARY)
    if "(a!)" not in schema and not name.endswith("_backward"):
        torch.library.register_autograd(f"fastlm::{name}", _no_derivative(name), lib=LIBRARY)
    overload = getattr(torch.ops.fastlm, name).default

    def call(*arguments: Any) -> Any:
        if watched() or not _PLAIN.issuperset(map(type, arguments)):
            checks.refuse_tangents(name, *arguments)
            return overload(*arguments)
        first = arguments[0]
        if first is None or first.is_cuda:
            return on_their_device(*arguments)
        return fake(*arguments) if first.is_meta else implementation(*arguments)

    return call


def _no_derivative(name: str) -> Callable:
    """The backward pass of a raw op that the dispatcher was asked to differentiate: vmap does, and an exported program
    whose parameters require gradients. Without it their gradients would be missing in silence."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            f"fastlm::{name} has no derivative below autograd's functions, where vmap and exported programs call it; "
            "differentiate the function of fastlm.ops, or call these under torch.no_grad()"
        )

    return backward


def compiler_is_loaded() -> bool:
    """Whether torch.compile's machinery is there. Where it has not been imported nobody can be tracing."""
    return "torch._dynamo" in sys.modules


def untraced(function: Callable) -> Callable:
    """torch.compiler.disable, without loading that machinery: for functions that hand addresses to C++.

    A graph that breaks in the middle of such a function would free the tensors whose addresses are on their way.
    """
    guarded = torch._disable_dynamo(function)  # torch.compiler.disable would import it here and now

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (guarded if compiler_is_loaded() else function)(*args, **kwargs)

    return call


def apply_of(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply`, without most of its steps for functorch (4 µs) where nobody looks."""
    plain = plain_apply_of(function)

    def apply(*arguments: Any) -> Any:
        if watched():
            return function.apply(*arguments)
        # What has outlived a transform of functorch is still wrapped.
        return plain(*[_unwrap_if_dead(a) if isinstance(a, torch.Tensor) else a for a in arguments])

    return apply


def plain_apply_of(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` without its steps for functorch: for tensors in memory, where nobody is `watched`."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def once_differentiable(backward: Callable) -> Callable:
    """A backward pass of which a second derivative is refused.

    torch's decorator of this name refuses it only where an incoming gradient requires one itself. That of a loss does
    not, and a penalty on its gradient would be gone in silence.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled():  # no graph is made of the backward pass: nearly always
            return backward(ctx, *gradients)
        with torch.no_grad():
            made = backward(ctx, *gradients)
        made = made if isinstance(made, tuple) else (made,)
        reason = b"fastlm's ops have no second derivative (once_differentiable)"
        refuse = torch._C._functions.DelayedError(reason, len(made))
        return refuse(*[g if g is None else g.detach().requires_grad_() for g in made])  # type: ignore[arg-type]

    return run


def graph_is_kept() -> bool:
    """In a backward pass: whether the graph may be run again, so that no gradient on the way may be written to."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()


def _on_their_device(implementation: Callable) -> Callable:
    """Make the tensors' GPU the current one for the call: kernels are launched, and allocate, on the current device."""

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
