"""The training step and generation of a small GPT, peer by peer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlm.bench.steps import PEERS, SIZES, Generator, Trainer
from fastlm.bench.timing import synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def made(make: Any, *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("size", ["nano", "micro"])
def test_training_step(benchmark: Any, size: str, dtype: torch.dtype, peer: str) -> None:
    trainer = made(Trainer, peer, SIZES[size], dtype, DEVICE)
    benchmark.group = f"training {SIZES[size]}, {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info["loss"] = trainer.backward().item()

    def timed() -> None:
        trainer.step()
        synchronize()

    benchmark(timed)


@pytest.mark.parametrize("peer", [p for p in PEERS if p != "torch.compile"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_generation(benchmark: Any, dtype: torch.dtype, peer: str) -> None:
    generator = made(Generator, peer, SIZES["micro"], dtype, DEVICE)
    benchmark.group = f"generation micro, {str(dtype).removeprefix('torch.')}"

    def timed() -> None:
        generator()
        synchronize()

    benchmark(timed)
