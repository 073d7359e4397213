"""Triton's interpreter, corrected in bfloat16 (a kernel's rounding under it is that of a GPU) and for new NumPy.

As it comes (3.9), it multiplies matrices of bfloat16 as if their bits were integers, and cuts bfloat16 off where a GPU
rounds to the nearest. It holds bfloat16 as uint16.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def correct() -> None:
    """Replace what is wrong; once, and only where kernels are interpreted."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # then no test runs a kernel
        return
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    patch = interpreter._patch_lang_tensor

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return _to_bfloat16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return _to_float32(data).view(np.uint32)
        return convert(data, source, target, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_to_float32(t.data), tl.float32) for t in (a, b))
        return dot(self, a, b, d, *rest)

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        # NumPy 2.4 no longer makes a number of an array of one element, which Triton 3.6 asks for. Triton 3.2 has no
        # scopes, and runs with older NumPys.
        if scope:
            scope[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of a float32, rounded to the nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
