"""op x case x mode x dtype x peer, over the ops' own benchmark cases. The errors are in the extra info of the JSON."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlm.bench.ops import call_of, difference, modes_of, numbers, op_name, reference
from fastlm.bench.peers import peers_of
from fastlm.bench.timing import synchronize
from fastlm.ops.case import Case, Maker, all_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
PEERS = (
    *(f"fastlm {name}" for name in ("cuda", "triton", "cpu", "reference")),
    *("eager", "torch.compile", "sdpa", "torch fused", "flash-attn", "liger"),
)
CASES_AND_MODES = [(case, mode) for case in all_cases(bench=True) for mode in modes_of(case)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("case", "mode"), CASES_AND_MODES, ids=str)
def test_op(benchmark: Any, case: Case, mode: str, dtype: torch.dtype, peer: str) -> None:
    arguments = case.build(Maker(dtype, DEVICE))
    found = {p.name: p for p in peers_of(case, arguments)}
    if peer not in found:
        pytest.skip(f"{peer} has nothing like {op_name(case)}")
    reason = found[peer].reason
    if reason is not None and not peer.endswith("reference"):
        pytest.skip(reason)
    benchmark.group = f"{op_name(case)} {case.name}, {mode}, {str(dtype).removeprefix('torch.')}"
    if "random" not in case.traits:
        error = difference(numbers(found[peer], arguments, mode), reference(case, dtype, DEVICE, mode))
        benchmark.extra_info["error"] = error
    call = call_of(found[peer], arguments, mode)

    def timed() -> None:
        call()
        synchronize()

    benchmark(timed)
