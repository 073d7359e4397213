"""The backend "emulator": the CUDA kernels, run on CPU tensors by the emulator, through the same Python wrappers.

The module is csrc/bindings.cpp itself with the emulated .cu files behind it, so its functions have the signatures of
fastlm._C. The CPU kernels are left out; their functions are null in it, and nothing here calls them.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from fastlm.ops import native, registry
from fastlm.ops.adamw import cuda as adamw
from fastlm.ops.attention import native as attention
from fastlm.ops.decode_attention import native as decode_attention
from fastlm.ops.embedding import native as embedding
from fastlm.ops.grad_norm import cuda as grad_norm
from fastlm.ops.layer_norm import native as layer_norm
from fastlm.ops.linear import cuda as linear
from fastlm.ops.linear_cross_entropy import cuda as linear_cross_entropy
from fastlm.ops.mlp import cuda as mlp
from fastlm.ops.rotary import native as rotary
from fastlm.ops.sample import native as sample
from tests.emulator import build

NAME = "emulator"
HOPPER = False  # whether the device is taken for one of compute capability 9.0: kernels of wgmma
MULTIPROCESSORS = 2  # of the emulated device: few, so that small tests have several turns of a persistent kernel


@functools.cache
def module() -> ModuleType:
    """Builds and loads the emulated module. Raises build.Unavailable where that is impossible."""
    ninja = build.Ninja("backend")
    bindings = ninja.object(build.CSRC / "bindings.cpp", flags=build.python_includes())
    kernels = [ninja.object(source) for source in sorted(build.CSRC.glob("*/*.cu"))]
    library = ninja.library("_C", [*kernels, ninja.weakened(bindings)])
    ninja.run()
    loader = importlib.machinery.ExtensionFileLoader("fastlm_emulator._C", str(library))
    spec = importlib.util.spec_from_file_location("fastlm_emulator._C", library, loader=loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


@functools.cache
def unavailable() -> str | None:
    """None where the emulator can run on this machine, else the reason why not."""
    try:
        module()
    except build.Unavailable as reason:
        return str(reason)
    return None


class Compiled:
    """Stands in for fastlm._C: the same functions, always the CUDA kernel, on the emulated device."""

    def layer_norm_forward(self, on_cuda: bool, *arguments: Any) -> None:
        module().layer_norm_forward(True, *arguments)

    def layer_norm_backward_workspace(self, on_cuda: bool, rows: int, cols: int, sms: int) -> int:
        return module().layer_norm_backward_workspace(True, rows, cols, MULTIPROCESSORS)

    def layer_norm_backward(self, on_cuda: bool, *arguments: Any) -> None:
        *arguments, _sms, stream = arguments
        module().layer_norm_backward(True, *arguments, MULTIPROCESSORS, stream)

    def rotary(self, on_cuda: bool, *arguments: Any) -> None:
        module().rotary(True, *arguments)

    def embedding_forward(self, on_cuda: bool, *arguments: Any) -> None:
        module().embedding_forward(True, *arguments)

    def embedding_backward_workspace(self, on_cuda: bool, *arguments: Any) -> int:
        return module().embedding_backward_workspace(True, *arguments)

    def embedding_backward(self, on_cuda: bool, *arguments: Any) -> None:
        module().embedding_backward(True, *arguments)

    def gemm_workspace(self, *arguments: Any) -> int:
        *arguments, _sms, _wgmma = arguments
        return module().gemm_workspace(*arguments, MULTIPROCESSORS, HOPPER)

    def gemm(self, *arguments: Any) -> None:
        *arguments, _sms, _wgmma, stream = arguments
        module().gemm(*arguments, MULTIPROCESSORS, HOPPER, stream)

    def column_sums_workspace(self, on_cuda: bool, rows: int, cols: int) -> int:
        return module().column_sums_workspace(True, rows, cols)

    def column_sums(self, on_cuda: bool, *arguments: Any) -> None:
        module().column_sums(True, *arguments)

    def activation_backward_workspace_cuda(self, rows: int, cols: int) -> int:
        return module().activation_backward_workspace_cuda(rows, cols)

    def activation_backward_cuda(self, *arguments: Any) -> None:
        module().activation_backward_cuda(*arguments)

    def adamw_step_cuda(self, *arguments: Any) -> None:
        module().adamw_step_cuda(*arguments)

    def grad_norm_cuda(self, *arguments: Any) -> None:
        module().grad_norm_cuda(*arguments)

    def cache_append_cuda(self, *arguments: Any) -> None:
        module().cache_append_cuda(*arguments)

    def row_linear_takes(self, *arguments: Any) -> bool:
        return module().row_linear_takes(*arguments)

    def row_linear_cuda(self, *arguments: Any) -> None:
        module().row_linear_cuda(*arguments)

    def decode_attention(self, on_cuda: bool, *arguments: Any) -> None:
        module().decode_attention(True, *arguments)

    def decode_attention_workspace(self, *arguments: Any) -> int:
        return module().decode_attention_workspace(*arguments)

    def sample(self, on_cuda: bool, *arguments: Any) -> None:
        module().sample(True, *arguments)

    def cross_entropy_block_cuda(self, *arguments: Any) -> None:
        module().cross_entropy_block_cuda(*arguments)

    def attention_forward(self, on_cuda: bool, *arguments: Any) -> None:
        module().attention_forward(True, *arguments)

    def attention_backward_workspace(self, *arguments: Any) -> int:
        return module().attention_backward_workspace(*arguments)

    def attention_backward(self, on_cuda: bool, *arguments: Any) -> None:
        module().attention_backward(True, *arguments)


@contextmanager
def emulated() -> Iterator[None]:
    """Inside, the ops' native wrappers call the emulated kernels."""
    before = native.C, native.on_cuda, native.has_wgmma
    native.C, native.on_cuda, native.has_wgmma = Compiled(), lambda t: True, lambda t: HOPPER
    try:
        yield
    finally:
        native.C, native.on_cuda, native.has_wgmma = before


class Emulated:
    """An op's native.py with its functions run on the emulator."""

    def __init__(self, native_op: ModuleType):
        self.op = native_op

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.op, name)
        return self._emulate(attribute) if callable(attribute) else attribute

    @staticmethod
    def _emulate(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            with emulated():
                return function(*arguments)

        return run


def register() -> None:
    """Makes the backend known to fastlm.ops. Nothing is built before it is used."""
    registry.register_backend(NAME, unavailable, device_type="cpu")
    for op in ("layer_norm", "rms_norm"):
        registry.register_implementation(op, NAME, Emulated(layer_norm))
    registry.register_implementation("rotary", NAME, Emulated(rotary))
    registry.register_implementation("embedding", NAME, Emulated(embedding))
    registry.register_implementation("linear", NAME, Emulated(linear))
    for op in ("linear_act", "mlp"):
        registry.register_implementation(op, NAME, Emulated(mlp))
    registry.register_implementation("adamw", NAME, Emulated(adamw))
    registry.register_implementation("grad_norm", NAME, Emulated(grad_norm))
    registry.register_implementation("decode_attention", NAME, Emulated(decode_attention))
    registry.register_implementation("sample", NAME, Emulated(sample))
    registry.register_implementation("linear_cross_entropy", NAME, Emulated(linear_cross_entropy))
    for op in ("attention", "attention_qkvpacked"):
        registry.register_implementation(op, NAME, Emulated(attention))
