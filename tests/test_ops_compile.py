"""Every op under torch.compile, opcheck, fake tensors and autocast."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm import ops
from fastlm.ops import registry
from fastlm.ops.case import Case, Maker, all_cases
from tests.op_suite import differentiable, first_cases, outputs_of, run

CASES = all_cases()
FIRST_CASES = first_cases()
# the first case of each op, and the one with the most arguments
COMPILED = list(
    {
        str(c): c
        for op in dict.fromkeys(c.op for c in CASES)
        for own in [[c for c in CASES if c.op == op]]
        for c in (own[0], max(own, key=lambda c: len(c.build(Maker()))))
    }.values()
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles_as_one_graph(case: Case) -> None:
    op = getattr(ops, case.op)
    arguments = case.build(Maker(torch.float32))
    eager = run(op, arguments)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    outputs, gradients, _ = run(compiled, arguments, eager[2])
    for got, wanted in zip([*outputs, *gradients], [*eager[0], *eager[1]], strict=True):
        assert (got is None and wanted is None) or torch.equal(got, wanted)


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_compiles_with_dynamic_shapes(case: Case) -> None:
    """One graph serves every batch size: nothing is compiled again when it changes."""
    op = getattr(ops, case.op)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, backend=counter, dynamic=True)
    arguments = case.build(Maker(torch.float32))
    length = next(v.shape[0] for v in arguments.values() if isinstance(v, Tensor))

    def repeated(times: int) -> dict:
        """The same call with a batch `times` as large; weights and options stay."""
        per_row = {k for k, v in arguments.items() if isinstance(v, Tensor) and v.shape[0] == length}
        per_row -= {k for k in per_row if "weight" in k or "bias" in k}
        return {k: torch.cat([v] * times) if k in per_row else v for k, v in arguments.items()}

    frames = set()
    for times in (2, 3, 4):
        wanted, got = outputs_of(op(**repeated(times))), outputs_of(compiled(**repeated(times)))
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)
        frames.add(counter.frame_count)
    assert len(frames) == 1, "it was compiled again for another batch size"


def test_compiled_code_follows_the_backend_setting() -> None:
    x, weight = torch.randn(4, 8), torch.ones(8)
    compiled = torch.compile(ops.layer_norm, fullgraph=True, backend="aot_eager")
    compiled(x, weight)
    with fastlm.backend("reference"):
        assert torch.equal(compiled(x, weight), ops.layer_norm(x, weight))
    with fastlm.backend("cuda"), pytest.raises(Exception, match="cuda"):
        compiled(x, weight)


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the calls of the raw ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlm":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [case.op for case in FIRST_CASES])
def test_opcheck(op: str) -> None:
    """The schema (nothing mutated or aliased) and the fake (shapes, dtypes, strides) of the raw ops, on real calls."""
    checked = set()
    for case in (c for c in CASES if c.op == op):
        with _Recorder() as recorder:
            run(getattr(ops, op), case.build(Maker(torch.float32)))
        for func, args, kwargs in recorder.calls:
            if case not in COMPILED and func in checked:
                continue
            args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))
            checked.add(func)
    assert {func._schema.name.rpartition("_")[2] for func in checked} == {"forward", "backward"}


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_fake_tensors_without_any_data(case: Case) -> None:
    """Shapes can be worked out with no memory: what a planner of a large model does."""
    arguments = case.build(Maker(torch.float32))
    wanted = outputs_of(getattr(ops, case.op)(**arguments))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        got = outputs_of(getattr(ops, case.op)(**fakes))
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in wanted]


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_autocast(case: Case) -> None:
    """Matrix products run in bfloat16 under autocast, norms keep their dtype; gradients have the leaf's dtype."""
    op = getattr(ops, case.op)
    arguments = case.build(Maker(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        outputs, gradients, _ = run(op, arguments)
    leaves = differentiable(arguments).values()
    keeps = case.op in ("layer_norm", "rms_norm", "linear_cross_entropy", "rotary", "embedding", "lstm")
    assert outputs[0].dtype == (torch.float32 if keeps else torch.bfloat16)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient is None or gradient.dtype == leaf.dtype
    plain, _, _ = run(op, arguments)
    torch.testing.assert_close(outputs[0].float(), plain[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", [n for n in registry.NAMES if n != "reference"])
def test_a_backend_by_name_never_falls_back(name: str) -> None:
    """float64 is the reference's alone: the others refuse it by name."""
    x, weight = torch.randn(2, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    assert ops.explain("layer_norm", x, weight).chosen == "reference"
    with fastlm.backend(name), pytest.raises(fastlm.UnsupportedError, match=f"backend '{name}' cannot run layer_norm"):
        ops.layer_norm(x, weight)
