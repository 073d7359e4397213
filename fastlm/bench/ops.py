"""Each op against its peers: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.bench import timing
from fastlm.bench.peers import Peer, peers_of
from fastlm.bench.timing import Comparison, Result, reason_of
from fastlm.ops.case import Case, Maker, all_cases, differentiable

FORWARD, BACKWARD, STEP = "forward", "forward+backward", "step"


def cases(names: list[str] | None = None, full: bool = False) -> list[Case]:
    """The benchmark cases of these ops (None: all): the first of each op, or every one.

    Raises:
        ValueError: there is no such op.
    """
    every = all_cases(bench=True)
    known = list(dict.fromkeys(op_name(case) for case in every))
    for name in names or []:
        if name not in known:
            raise ValueError(f"there is no op {name!r} with benchmark cases; the ops are: {', '.join(known)}")
    chosen = [case for case in every if names is None or op_name(case) in names]
    if full:
        return chosen
    return [case for i, case in enumerate(chosen) if op_name(case) not in map(op_name, chosen[:i])]


def compare(
    case: Case,
    dtype: torch.dtype,
    device: str,
    rounds: int,
    budget: float,
    skip: set[str],
    find: Callable[[Case, dict[str, Any]], list[Peer]] = peers_of,
) -> Iterator[Comparison]:
    """Time and check one case, in each of its modes. `skip`: peers that are not wanted. `find`: makes the peers."""
    for mode in modes_of(case):
        arguments = case.build(Maker(dtype, device))
        peers = [p for p in find(case, arguments) if p.name not in skip]
        calls = {p.name: call_of(p, arguments, mode) for p in peers if p.reason is None}
        measured = timing.interleave(calls, rounds, budget)
        results = [measured.get(p.name, Result(p.name, reason=p.reason)) for p in peers]
        wanted = reference(case, dtype, device, mode)
        for peer, result in zip(peers, results, strict=True):
            if result.seconds and "random" not in case.traits:
                try:
                    result.error = difference(numbers(peer, case.build(Maker(dtype, device)), mode), wanted)
                except Exception as error:
                    result.reason = f"measured, but its numbers could not be checked: {reason_of(error)}"
        yield Comparison("op", f"{op_name(case)} {case.name}", mode, str(dtype).removeprefix("torch."), results)
        if "torch.compile" not in skip:
            torch._dynamo.reset()  # one case's code is of no use to the next


def difference(got: list[Tensor | None], wanted: list[Tensor | None]) -> float:
    """The largest relative rms difference of any tensor: |got - wanted| / |wanted|."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a is None or b is None:
            continue
        scale = b.double().norm().item()
        worst = max(worst, (a.double() - b.double()).norm().item() / (scale or 1.0))
    return worst


def modes_of(case: Case) -> list[str]:
    """What is timed of a case."""
    if "in-place" in case.traits:
        return [STEP]
    return [FORWARD] if "forward" in case.traits else [FORWARD, BACKWARD]


def op_name(case: Case) -> str:
    """The op's name in the registry."""
    return case.op.rstrip("_")


def call_of(peer: Peer, arguments: dict[str, Any], mode: str) -> Callable[[], Any]:
    """What is timed: one call of the peer, in one of the modes."""
    if mode != BACKWARD:

        def forward() -> Any:
            with torch.no_grad(), peer.context():
                return peer.function(**arguments)

        return forward

    leaves = _leaves(arguments)
    given = {**arguments, **leaves}
    upstream: list[Tensor] = []

    def backward() -> Any:
        with peer.context():
            outputs = _differentiable(peer.function(**given))
            if not upstream:
                upstream.extend(_upstream(outputs))
            return torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)

    return backward


def numbers(peer: Peer, arguments: dict[str, Any], mode: str) -> list[Tensor | None]:
    """What is checked: the outputs and the gradients, or the parameters and moments after a step."""
    with peer.context():
        if mode == STEP:
            with torch.no_grad():
                peer.function(**arguments)
            return [*arguments["params"], *arguments["exp_avgs"], *arguments["exp_avg_sqs"]]
        if mode == FORWARD:
            with torch.no_grad():
                return [*_outputs(peer.function(**arguments))]
        leaves = _leaves(arguments)
        outputs = _outputs(peer.function(**{**arguments, **leaves}))
        smooth = [o for o in outputs if o.requires_grad]
        gradients = torch.autograd.grad(smooth, list(leaves.values()), _upstream(smooth), allow_unused=True)
        return [*(o.detach() for o in outputs), *gradients]


def reference(case: Case, dtype: torch.dtype, device: str, mode: str) -> list[Tensor | None]:
    """The reference backend's numbers, computed in float32 from the very inputs that the peers get."""
    arguments = {name: _float32(value) for name, value in case.build(Maker(dtype, device)).items()}
    with fastlm.backend("reference"):
        return numbers(Peer("reference", getattr(ops, case.op)), arguments, mode)


def _float32(value: Any) -> Any:
    if isinstance(value, list):
        return [_float32(v) for v in value]
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in differentiable(arguments).items()}


def _outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _differentiable(result: Any) -> list[Tensor]:
    return [o for o in _outputs(result) if o.requires_grad]


def _upstream(outputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(o.shape, generator=generator).to(o.device, o.dtype) if o.dim() else torch.ones_like(o)
        for o in outputs
    ]
