"""A Triton kernel as an op's triton.py declares it: how its configuration is chosen, and a launch that costs little.

Triton's own launch binds, specialises and looks up in Python at each call. Here the compiled kernel is kept under a key
made of what can change the code (dtypes, alignment, divisibility, constants, configuration), and the launch goes
straight to its launcher; the first launch under a key goes through Triton, which compiles.
"""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlm.ops.triton_support import availability, tuned
from fastlm.ops.triton_support.config import Config
from fastlm.ops.triton_support.target import architecture

__all__ = ["Config", "Example", "Kernel"]

Problem = Hashable  # what the choice of a configuration depends on: a tuple of names and numbers, few of each

# The kinds of parameters, by what of an argument can change the code.
_POINTER, _UNALIGNED, _DIVISIBLE, _CONSTANT, _FREE = range(5)


@dataclass(frozen=True)
class Example:
    """A call of raw functions that launches kernels: compiled ahead of time on meta tensors, tuned on real ones."""

    name: str
    call: Callable[[], Any]


class Recorder(ABC):
    """What a test, the compiler or the tuner puts in the way of the launches; see `Kernel.recorder`."""

    @abstractmethod
    def choose(self, kernel: Kernel, problem: Problem, candidates: Sequence[Config]) -> Config:
        """One of the candidates."""

    @abstractmethod
    def launch(self, kernel: Kernel, config: Config, grid: tuple[int, int, int], arguments: tuple) -> bool:
        """True where the launch is not to happen."""


class Kernel:
    """A kernel by the name of its module and function, and the configurations that it may be compiled with.

    Args:
        name: "package.module:function"; imported at the first launch.
        candidates: (architecture, problem) -> the configurations that may be chosen, the best guess first.
    """

    recorder: Recorder | None = None  # of all kernels

    def __init__(self, name: str, candidates: Callable[[str, Any], Sequence[Config]]) -> None:
        self.name = name
        self.candidates = candidates
        self._configs: dict[tuple, Config] = {}
        self._compiled: dict[tuple, Any] = {}

    def __repr__(self) -> str:
        return f"Kernel({self.name})"

    @functools.cached_property
    def label(self) -> str:
        """Short and unique: layer_norm.forward."""
        module, _, function = self.name.partition(":")
        return f"{module.split('.')[-2]}.{function}"

    @functools.cached_property
    def function(self) -> Any:
        """The function under @triton.jit (or its interpreted form)."""
        module, _, function = self.name.partition(":")
        return getattr(importlib.import_module(module), function)

    def config(self, device: torch.device, problem: Problem) -> Config:
        """The configuration for a problem: what `fastlm tune` found on this GPU, else the best guess."""
        if Kernel.recorder is not None:
            return Kernel.recorder.choose(self, problem, self.candidates(architecture(device), problem))
        key = device, problem
        config = self._configs.get(key)
        if config is None:
            candidates = self.candidates(architecture(device), problem)
            config = tuned.lookup(device, self.label, problem, candidates) or candidates[0]
            self._configs[key] = config
        return config

    def __call__(self, config: Config, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current stream of the current device, which must be the tensors'."""
        if Kernel.recorder is not None and Kernel.recorder.launch(self, config, grid, arguments):
            return
        self.start(config, grid, arguments)

    def start(self, config: Config, grid: tuple[int, int, int], arguments: tuple) -> None:
        """The launch itself."""
        if 0 in grid:
            return
        if not _fast():
            self._launch(config, grid, arguments)
            return
        device = torch.cuda.current_device()
        key = self._key(device, config, arguments)
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._launch(config, grid, arguments)
            return
        compiled.run(
            *grid,
            torch._C._cuda_getCurrentRawStream(device),
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *arguments,
            *config.constants.values(),
        )

    def _launch(self, config: Config, grid: tuple[int, int, int], arguments: tuple) -> Any:
        """Through Triton itself, which compiles where it has to; the result is the compiled kernel."""
        self.check(config, arguments)
        options = {} if availability.INTERPRETED else config.options()
        return self.function[grid](*arguments, **config.constants, **options)

    @functools.cached_property
    def _kinds(self) -> list[int]:
        kinds = []
        for parameter in self.function.params:
            if parameter.is_constexpr:
                kinds.append(_CONSTANT)
            elif not parameter.annotation:
                kinds.append(_UNALIGNED if parameter.do_not_specialize_on_alignment else _POINTER)
            elif parameter.do_not_specialize or not parameter.annotation.startswith(("i", "u")):
                kinds.append(_FREE)
            else:
                kinds.append(_DIVISIBLE)
        return kinds

    def _key(self, device: int, config: Config, arguments: tuple) -> tuple:
        key: list[Any] = [device, config]
        for kind, a in zip(self._kinds, arguments, strict=False):  # the constants of the configuration come after them
            if kind == _POINTER:
                if type(a) is Tensor:
                    key.append(a.dtype)
                    key.append(a.data_ptr() % 16 == 0)
                else:
                    key.append(_kind_of_pointer(a))
            elif kind == _UNALIGNED:
                key.append(None if a is None else a.dtype)
            elif kind == _DIVISIBLE:
                key.append(a % 16 == 0)
            elif kind == _CONSTANT:
                key.append(a)
        return tuple(key)

    def check(self, config: Config, arguments: tuple) -> None:
        """The rules of a signature, and that the launch hands over what the kernel takes."""
        if availability.INTERPRETED:
            return
        names = [p.name for p in self.function.params]
        given = names[: len(arguments)]
        if names != [*given, *config.constants]:
            raise TypeError(f"{self.label}: takes {names}, got {given} and the constants {list(config.constants)}")
        for parameter, a in zip(self.function.params, arguments, strict=False):
            if isinstance(a, (int, float)) and not parameter.annotation:
                raise TypeError(f"{self.label}: the number {parameter.name} needs an annotation, as tl.int32")


def _kind_of_pointer(a: Any) -> Any:
    """Of what is no plain tensor: a parameter of a module, None, or a tensor descriptor."""
    if a is None:
        return None
    if isinstance(a, Tensor):
        return a.dtype, a.data_ptr() % 16 == 0
    return a.base.dtype, tuple(a.block_shape)


@functools.cache
def _supports_fast_launch() -> bool:
    # Before 3.4 a compiled kernel's launcher takes other arguments. For AMD the code depends on the tensors' sizes too.
    return not availability.INTERPRETED and availability.version() >= (3, 4) and torch.version.hip is None


def _fast() -> bool:
    """Whether a launch may go around Triton: not where a profiler looks at Triton's launches."""
    return _supports_fast_launch() and _knobs().launch_enter_hook is None


@functools.cache
def _knobs() -> Any:
    from triton import knobs

    return knobs.runtime
