"""What a GPU wrote in the conformance examples, as `python -m benchmarks.gpu` has recorded it: the emulator must write
the same. An output is kept as its SHA-256; where only an approximation is promised, as the numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.emulator.conformance import Example

PATH = Path(__file__).with_name("gpu_outputs.json")


def of(example: Example, got: np.ndarray) -> str | list[float]:
    """How an output is kept."""
    words = np.ascontiguousarray(got).view(np.uint32).reshape(-1)
    if example.relative_error is not None:
        return [float(x) for x in words.view(np.float32)]
    return hashlib.sha256(words.tobytes()).hexdigest()


def recorded() -> dict[str, Any]:
    """By example; empty where no GPU has run them yet."""
    return json.loads(PATH.read_text(encoding="utf-8"))["outputs"] if PATH.is_file() else {}


def agrees(example: Example, got: np.ndarray, kept: str | list[float]) -> bool:
    """Whether an output is the kept one: to the bit, or within the error that the example allows."""
    mine = of(example, got)
    if isinstance(mine, str) or isinstance(kept, str):
        return mine == kept
    assert example.relative_error is not None
    x, y = np.array(mine), np.array(kept)
    return bool((np.abs(x - y) <= 2 * example.relative_error * (np.abs(y) + 2**-10)).all())
