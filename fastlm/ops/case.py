"""What a test or benchmark case of an op is. Each op's cases.py lists its own; tests and benchmarks iterate them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import registry

NO_GRADIENT = frozenset({"alibi_slopes", "cos", "sin"})  # floating-point arguments that are constants by contract


@dataclass
class Maker:
    """Makes a case's inputs: the same numbers for a seed on every device (drawn on the CPU in float32)."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def randn(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        t = torch.randn(shape, generator=self.generator) * scale + shift
        return t.to(self.device, dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Args:
        op: the function's name in `fastlm.ops`.
        name: unique within the op.
        build: makes the keyword arguments of the op.
        eager: the same function written as textbook PyTorch, with the op's arguments: what a kernel's error and time
            are measured against.
        bench: a representative size, for benchmarks; too large for the tests.
        traits: what is special about it ("dropout" …); a test may leave cases out by trait.
    """

    op: str
    name: str
    build: Callable[[Maker], dict[str, Any]]
    eager: Callable[..., Any]
    bench: bool = False
    traits: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def differentiable(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The arguments of an op that gradients can be asked of."""
    return {
        k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point() and k not in NO_GRADIENT
    }


def all_cases(bench: bool = False) -> list[Case]:
    """Every case of every op: the small ones of the tests, or those for benchmarks."""
    modules = dict.fromkeys(m["reference"].__name__.rpartition(".")[0] for m in registry.implementations().values())
    cases = [case for name in modules for case in importlib.import_module(f"{name}.cases").CASES]
    return [case for case in cases if case.bench == bench]
