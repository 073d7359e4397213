"""The CPU kernel of attention: bits that do not depend on the threads, every instruction set, any shape and option."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm
from fastlm.ops import attention, native
from fastlm.ops.attention.cases import CASES, _build, eager_attention
from fastlm.ops.case import Maker
from tests.op_suite import run, wide

if native.cpu_unavailable() is not None:
    pytest.skip(str(native.cpu_unavailable()), allow_module_level=True)


@pytest.fixture
def threads():
    """Gives back the number of threads that was set."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHARED_OUT: dict[str, dict[str, Any]] = {
    "heads": {"batch": 3, "length": 150, "heads": 7, "causal": True},  # dk and dv: a task for each head
    "blocks-of-a-head": {"batch": 1, "length": 400, "heads": 2, "causal": True},  # several tasks for a head
    "groups": {"batch": 2, "length": 130, "heads": 6, "kv_heads": 2, "window": (50, None)},
    "packed": {"batch": 1, "lengths": (90, 0, 3, 170, 64), "heads": 3, "causal": True, "dropout_p": 0.1},
    "decoding": {"batch": 2, "length": 1, "columns": 900, "heads": 8, "kv_heads": 2, "causal": True},
    "few-rows-of-one-head": {"batch": 1, "length": 40, "columns": 1300, "heads": 1},  # parts of the columns
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHARED_OUT)
def test_the_same_bits_on_1_2_and_3_threads(name: str, dtype: torch.dtype, threads) -> None:
    arguments = _build(width=32, return_lse=True, **SHARED_OUT[name])(Maker(dtype))
    results = []
    with fastlm.backend("cpu"):
        for n in (1, 2, 3):
            threads(n)
            outputs, gradients, _ = run(attention, arguments)
            results.append([*outputs, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["heads", "groups", "packed", "decoding", "few-rows-of-one-head"])
def test_where_work_is_cut(name: str) -> None:
    """Against float64, at sizes with several blocks and parts."""
    arguments = _build(width=32, return_lse=True, **SHARED_OUT[name])(Maker())
    with fastlm.backend("cpu"):
        outputs, gradients, upstream = run(attention, arguments)
    wanted, wanted_gradients, _ = run(eager_attention, wide(arguments), upstream)
    for got, want in zip([*outputs, *gradients], [*wanted, *wanted_gradients], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# In a process of its own, since an instruction set is chosen once a process.
SCRIPT = """
import sys, torch, fastlm
from fastlm.ops import native
from fastlm.ops.attention.cases import CASES
from tests.op_suite import check_case
torch.set_num_threads(1)
for case in CASES:
    if case.name in sys.argv[1:]:
        check_case("cpu", case, torch.float32)
        check_case("cpu", case, torch.bfloat16)
print(native.C.cpu_isa())
"""
ON_EVERY_ISA = ["long", "gqa", "width-20", "width-80", "softcap", "decode-gqa", "everything", "everything-packed"]


@pytest.mark.parametrize("isa", native.C.cpu_isas() if native.C is not None else [])
def test_every_instruction_set(isa: str) -> None:
    assert set(ON_EVERY_ISA) <= {case.name for case in CASES}
    environment = {**os.environ, "FASTLM_CPU_ISA": isa}
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", SCRIPT, *ON_EVERY_ISA]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@pytest.mark.parametrize("case", [case for case in CASES if case.op == "attention" and not case.bench], ids=str)
def test_what_a_call_leaves_in_the_buffers_reaches_no_other(case: Any) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the buffers are a thread's
    try:
        arguments = case.build(Maker())
        wanted, wanted_gradients, upstream = run(attention, arguments)
        poison = {name: torch.full((1, 192, 4, arguments[name].shape[-1]), torch.nan) for name in "qkv"}
        run(attention, poison)
        got, gradients, _ = run(attention, arguments, upstream)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip([*got, *gradients], [*wanted, *wanted_gradients], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    side = st.none() | st.integers(0, 90)
    options: dict[str, Any] = {
        "batch": 1,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.integers(1, 4)),
        "width": draw(st.integers(1, 40)),
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(side, side)),
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "alibi": draw(st.sampled_from(["", "heads", "batch"])),
        "dropout_p": draw(st.sampled_from([0.0, 0.3])),
        "layout": draw(st.sampled_from(["", "heads-first", "odd-strides"])),
        "return_lse": True,
    }
    if draw(st.booleans()):
        options["lengths"] = tuple(draw(st.lists(st.integers(0, 80), min_size=1, max_size=4)))
    else:
        options["batch"] = draw(st.integers(0, 2))
        options["length"], options["columns"] = draw(st.integers(0, 140)), draw(st.integers(0, 200))
    return options


@settings(max_examples=60, deadline=None, derandomize=True)
@given(calls())
def test_any_shape_and_option(options: dict[str, Any]) -> None:
    arguments = _build(**options)(Maker())
    with fastlm.backend("cpu"):
        outputs, gradients, upstream = run(attention, arguments)
    wanted, wanted_gradients, _ = run(eager_attention, wide(arguments), upstream)
    for got, want in zip([*outputs, *gradients], [*wanted, *wanted_gradients], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
