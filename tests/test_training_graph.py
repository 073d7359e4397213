"""A recorded pass gives the losses and gradients of the direct one.

On a GPU the graphs are CUDA's. Without one a stand-in keeps their rules: recording computes nothing that stays, and a
replay fills the tensors of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm
from fastlm.ops import graphs
from fastlm.training.graph import WARM_UP, RecordedPass

SMALL: dict[str, Any] = {"vocab_size": 97, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}


class StandIn:
    """A graph of a function that makes gradients of `parameters`."""

    def __init__(self, function: Callable[[], Tensor], parameters: list[nn.Parameter]) -> None:
        self.function, self.parameters = function, parameters
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        self.anew = all(grad is None for grad in before)
        self.loss = function()
        for p, grad in zip(parameters, before, strict=True):
            p.grad.copy_(torch.full_like(p.grad, torch.nan) if grad is None else grad)
        self.gradients = [p.grad for p in parameters]

    def replay(self) -> None:
        for p, kept in zip(self.parameters, self.gradients, strict=True):
            p.grad = None if self.anew else kept
        self.loss.copy_(self.function())
        if self.anew:
            for p, kept in zip(self.parameters, self.gradients, strict=True):
                kept.copy_(p.grad)
                p.grad = None  # a replay fills memory, and says nothing to the parameters

    def pool(self) -> None:
        return None


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    return request.param


class Training:
    """A model, its batches and its passes, direct or recorded."""

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch, recorded: bool, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = fastlm.GPT(fastlm.GPTConfig(**SMALL, dropout=dropout)).to(device)
        self.parameters = list(self.model.parameters())
        self.optimizer = fastlm.optim.AdamW(self.parameters, lr=1e-2)
        self.generator = torch.Generator().manual_seed(1)
        self.run: Callable[..., Tensor] = RecordedPass(self.direct, self.parameters) if recorded else self.direct
        if device == "cpu":
            monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
            monkeypatch.setattr(graphs, "record", self.record)
            monkeypatch.setattr(graphs, "possible", lambda device: True)

    def record(self, function: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[StandIn, Tensor]:
        graph = StandIn(function, self.parameters)
        return graph, graph.loss

    def direct(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.model(x, y)[1]
        loss.backward()
        return loss

    def batch(self, rows: int = 3) -> Tensor:
        return torch.randint(97, (rows, 17), generator=self.generator).to(self.model.device)

    def step(self, passes: int = 1, rows: int = 3) -> list[float]:
        losses = []
        for _ in range(passes):
            ids = self.batch(rows)
            losses.append(self.run(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).item())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses


@pytest.mark.parametrize("passes", [1, 3])
def test_losses_are_those_of_the_direct_passes(device: str, monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """Also the weights after the steps, and so the gradients; a smaller batch in between takes the direct way."""
    direct, recorded = (Training(device, monkeypatch, recorded) for recorded in (False, True))
    for step in range(WARM_UP + 4):
        rows = 2 if step == WARM_UP + 1 else 3
        assert recorded.step(passes, rows) == pytest.approx(direct.step(passes, rows), rel=1e-5)
    for a, b in zip(recorded.parameters, direct.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert isinstance(recorded.run, RecordedPass) and len(recorded.run._graphs) == min(passes, 2)


def test_gradients_that_are_not_the_graphs_are_added_to(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(device, monkeypatch, recorded=True)
    for _ in range(WARM_UP + 1):
        training.step()
    for p in training.parameters:
        p.grad = torch.ones_like(p)
    ids = training.batch()
    training.run(ids[:, :-1], ids[:, 1:])
    found = [p.grad.clone() for p in training.parameters if p.grad is not None]
    training.optimizer.zero_grad()
    training.direct(ids[:, :-1], ids[:, 1:])
    for grad, p in zip(found, training.parameters, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(grad, p.grad + 1, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_on_a_cpu_every_pass_is_direct() -> None:
    weight = nn.Parameter(torch.ones(2))
    calls = []

    def compute(x: Tensor) -> Tensor:
        calls.append(x)
        loss = (weight * x).sum()
        loss.backward()
        return loss

    run = RecordedPass(compute, [weight])
    for step in range(WARM_UP + 2):
        loss = run(torch.full((2,), float(step)))
        assert loss.item() == 2 * step and not loss.requires_grad
    assert len(calls) == WARM_UP + 2 and weight.grad is not None
    assert weight.grad.tolist() == [sum(range(WARM_UP + 2))] * 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no more"), RuntimeError("it waits")], ids=["memory", "waits"]
)
def test_where_nothing_can_be_recorded_passes_stay_direct(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    direct, recorded = (Training("cpu", monkeypatch, recorded) for recorded in (False, True))

    def record(function: Callable[[], Tensor], device: torch.device, pool: Any) -> Any:
        function()  # gradients have been made when it fails
        raise error

    monkeypatch.setattr(graphs, "record", record)
    for step in range(WARM_UP + 2):
        fails = step == (WARM_UP + 1) // 2  # the first step that begins after the direct passes
        with pytest.warns(UserWarning, match=str(error)) if fails else nullcontext():
            losses = recorded.step(2)
        assert losses == pytest.approx(direct.step(2), rel=1e-5)


def test_dropout_is_drawn_anew_at_each_replay(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(device, monkeypatch, recorded=True, dropout=0.5)
    ids = training.batch()
    losses = []
    for _ in range(WARM_UP + 4):
        losses.append(training.run(ids[:, :-1], ids[:, 1:]).item())
        training.optimizer.zero_grad(set_to_none=True)
    assert len(set(losses)) == len(losses)
