"""Tensors on two devices, a current device that is not theirs, a GPU that is too old; none of it needs a GPU."""

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
