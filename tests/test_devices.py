"""Tensors on two devices, a current device that is not theirs, a GPU that is too old, a grid that no GPU takes: by what
the code asks and answers, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlm import ops
from fastlm.ops import library, native
from fastlm.ops.case import Case, Maker
from tests.emulator import backend
from tests.op_suite import first_cases


@pytest.mark.parametrize("case", first_cases(), ids=lambda c: c.op)
def test_tensors_on_two_devices_are_refused_by_name(case: Case) -> None:
    arguments = case.build(Maker())
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    assert names
    for name in names[1:]:
        moved = {**arguments, name: arguments[name].to("meta")}
        with pytest.raises(ValueError, match=r"\w is on \w+, but \w+ is on \w+; they must be on one device") as error:
            getattr(ops, case.op)(**moved)
        assert name in str(error.value)


@pytest.mark.parametrize("current", [0, 1])
def test_an_op_runs_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch, current: int) -> None:
    inside: list[int] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: wanted.index)
        yield
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)

    def kernel(*arguments: Any) -> None:
        inside.append(torch.cuda.current_device())

    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    library._on_their_device(kernel)(tensor, 3)
    assert inside == [1] and torch.cuda.current_device() == current


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "compute capability 7.5; the kernels need 8.0 or newer"), ((8, 0), None)]
)
def test_an_older_gpu_is_refused_with_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(native, "C", SimpleNamespace(build_info=lambda: {"cuda": "13.0"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    got = native.cuda_unavailable.__wrapped__()
    assert got is None if reason is None else reason in got


TOO_MANY = 2**31
ATTENTION = (0,) * 6, (*(0,) * 9, 0, 0, 2**24, 2**16, 2**16, 1, 1, 8, -1, -1, 2**16, 0), 1.0, 0.0, 0, 1.0, 2
DECODE = (0,) * 8, (*(0,) * 6, 0, 2**16, 1, 1, 1, 8, 8, 0, 0, 0, -1), 1.0, 0.0, 2
GRIDS: dict[str, tuple] = {
    "layer_norm_forward": (True, *(0,) * 8, TOO_MANY, 65536, 0, 0, 1e-5, False, 0, 0, 0, 0),
    "attention_forward": (True, 0, 0, *ATTENTION, 0),
    "attention_backward": (True, (0,) * 7, (0,) * 5, *ATTENTION, 0, 0),
    "decode_attention": (True, *DECODE, 0),
    "embedding_forward": (True, 0, True, 0, 0, TOO_MANY, 8, 8, 8, 0, 0),
    "rotary": (
        True,
        (16, 0, 16, 0, 0, 0, 0),
        (*(0,) * 6, 1, *(0,) * 7, 1, 0, 0, TOO_MANY, 1, 8, 4),
        False,
        False,
        False,
        0,
        0,
    ),
    "sample": (True, 0, 0, 0, TOO_MANY, 8, 8, False, 1.0, 0, 1.0, 0.0, 0, 0),
    "cross_entropy_block_cuda": (0, 0, 0, 0, 0, TOO_MANY, 8, 8, -100, 0.0, 0.0, 0.0, False, 0, 0),
    "adamw_step_cuda": (0, 1, TOO_MANY, 0.1, 0.9, 0.99, 1e-8, 0.0, 1, 1.0, False, 0, 0),
    "grad_norm_cuda": (0, 1, TOO_MANY, 0, 1.0, 0, 0),
}


@pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable()))
@pytest.mark.parametrize("function", GRIDS)
def test_a_grid_over_the_limits_is_refused_before_anything_is_read(function: str) -> None:
    """The addresses are null: a kernel that began would crash."""
    with pytest.raises(ValueError, match=r"2147483647|at most 65535"):
        getattr(backend.module(), function)(*GRIDS[function])
