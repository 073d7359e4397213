"""Launches of the Triton kernels: one graph under torch.compile, no wait for the GPU, no kernel for a new length.

The launches are those of meta tensors, as of the architecture that is named; nothing is computed, and no GPU is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import fastlm
from fastlm import ops
from fastlm.ops import registry
from fastlm.ops.case import Maker
from fastlm.ops.triton_support import INTERPRETED, Config, Kernel, ahead
from fastlm.ops.triton_support import kernel as kernel_module
from fastlm.ops.triton_support.target import pretend
from tests.conftest import ROOT
from tests.op_suite import first_cases, run

META = torch.device("meta")


@pytest.mark.skipif(not INTERPRETED, reason="compares with tensors on the CPU")
@pytest.mark.parametrize("op", ["layer_norm", "attention", "mlp", "linear_cross_entropy", "lstm"])
def test_compiles_as_one_graph(op: str) -> None:
    torch._dynamo.reset()
    arguments = next(case for case in first_cases() if case.op == op).build(Maker())
    with fastlm.backend("triton"):
        outputs, gradients, upstream = run(getattr(ops, op), arguments)
        compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
        got, got_gradients, _ = run(compiled, arguments, upstream)
    for a, b in zip([*got, *got_gradients], [*outputs, *gradients], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


class _NoWaiting(TorchDispatchMode):
    """Refuses what waits for a GPU or makes a size of what it computed: then no CUDA graph can be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"), name
        result = func(*args, **(kwargs or {}))
        if name in ("aten::_to_copy", "aten::copy_"):
            tensors = [result, *(a for a in args if isinstance(a, torch.Tensor))]
            assert len({t.device for t in tensors}) == 1, f"{name} to another device"
        return result


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_launch_waits_for_the_gpu(arch: str) -> None:
    with pretend(arch):
        for module in ahead.modules().values():
            for example in module.examples(META):
                with _NoWaiting():
                    assert ahead._record(example, None).launches, example.name


def test_the_guard_refuses_waiting() -> None:
    with _NoWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(1).item()


# In a process of its own: where kernels are interpreted, they have no signature.
KEYS = """
import json, torch
from fastlm.ops.attention import triton as attention
from fastlm.ops.embedding import triton as embedding
from fastlm.ops.layer_norm import triton as layer_norm
from fastlm.ops.linear_cross_entropy import triton as loss
from fastlm.ops.lstm import triton as lstm
from fastlm.ops.mlp import triton as mlp
from fastlm.ops.rotary import triton as rotary
from fastlm.ops.triton_support import ahead
from fastlm.ops.triton_support.kernel import Example
from fastlm.ops.triton_support.target import pretend

def make(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)

def norm(length):
    x, weight = make(2, length, 768), make(768)
    y, _, statistics = layer_norm.forward(x, weight, weight, None, 1e-5, False)
    layer_norm.backward(y, None, x, weight, statistics, True, False)

def block(length):
    x, fc, proj = make(4, length, 768), make(3072, 768), make(768, 3072)
    y, pre = mlp.mlp_forward(x, fc, None, proj, None, "gelu_tanh", True)
    mlp.mlp_backward(y, x, fc, proj, pre, "gelu_tanh", [True, True, False, True, False], torch.bfloat16)

def wide_norm(length):
    x, weight = make(1, length, 16384), make(16384)
    y, _, statistics = layer_norm.forward(x, weight, None, None, 1e-5, False)
    layer_norm.backward(y, None, x, weight, statistics, False, False)

def attend(length):
    q, k = make(2, length, 8, 64), make(2, length, 2, 64)
    options = (None, None, None, 0.125, -1, 0, 0.0, 0.0, length)
    out, lse = attention.forward(q, k, k, *options)
    attention.backward(out, None, q, k, k, out, lse, *options, q, k, k)

def packed(length):
    q, ends = make(1, length, 8, 64), make(4).to(torch.int32)
    options = (None, ends, None, 0.125, -1, 0, 0.0, 0.0, length)
    out, lse = attention.forward(q, q, q, *options)
    attention.backward(out, None, q, q, q, out, lse, *options, q, q, q)

def turn(length):
    q, angles = make(2, length, 8, 64), make(length, 32).float()
    rotary.backward(*rotary.forward(q, q, angles, angles, None, False, False), angles, angles, None, False)

def embed(length):
    ids, weight = make(2, length).to(torch.int64), make(1000, 768)
    embedding.backward(embedding.forward(ids, weight), ids, 1000, -1)

def head(length):
    x, weight, targets = make(4 * length, 768), make(1000, 768), make(4 * length).to(torch.int64)
    options = (-100, 0.0, 0.0, 0.0, [True, True])
    loss.forward(x, weight, targets, "mean", *options)

def recur(length):
    length = min(length, 64 + length % 64)
    gates, state, weight = make(32, length, 1024), make(32, 256), make(1024, 256)
    y, cells, activations = lstm.forward(gates, state, state, weight)
    lstm.backward(y, None, state, state, weight, y, cells, activations)

for arch in ("sm_80", "sm_90"):
    for call in (norm, wide_norm, attend, packed, turn, embed, head, recur, block):
        kernels = []
        with pretend(arch):
            for length in (1000, 1024, 1111, 1536, 2047, 2**21 + 1):
                found = ahead._record(Example("", lambda: call(length)), None).launches
                kernels.append(sorted({kernel.label + repr(kernel._key(0, *rest)) for kernel, *rest in found}))
        print(json.dumps([arch, call.__name__, kernels]))
numbers = {}
for module in ahead.modules().values():
    for example in module.examples(torch.device("meta")):
        for kernel, *_ in ahead._record(example, None).launches:
            for p in kernel.function.params:
                if p.name.endswith("stride") and p.name != "slopes_stride":  # of ALiBi: a number a head
                    numbers[kernel.label + " " + p.name] = p.annotation
print(json.dumps(numbers))
"""


@pytest.fixture(scope="module")
def launched() -> list:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", KEYS], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_new_sequence_length_makes_no_new_kernel(launched: list) -> None:
    """Among lengths that take the same tiles: matrix products have those for up to three numbers of rows."""
    *calls, _ = launched
    assert len(calls) == 2 * 9
    for arch, call, kernels in calls:
        assert kernels[0], (arch, call)
        assert len(set(map(tuple, kernels))) == 1, (arch, call)


def test_strides_take_64_bits(launched: list) -> None:
    """A row's place passes 2^31 in a large tensor, though its number does not."""
    strides = launched[-1]
    assert len(strides) > 10
    assert not {name: kind for name, kind in strides.items() if kind != "i64"}


def test_a_launch_goes_to_the_current_stream_and_each_device_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"device": 0, "stream": 7}
    monkeypatch.setattr(kernel_module, "_fast", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now["device"])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: (device, now["stream"]), raising=False)
    compiled, launched = [], []

    def compile_and_launch(config: Config, grid: tuple, arguments: tuple) -> SimpleNamespace:
        device = now["device"]
        compiled.append(device)
        run = lambda *given: launched.append((device, *given[3:5]))  # noqa: E731
        return SimpleNamespace(run=run, function=f"code for {device}", packed_metadata=None)

    config = Config(BLOCK=64)
    kernel = Kernel("fastlm.ops.none:kernel", lambda arch, problem: (config,))
    monkeypatch.setattr(kernel, "_launch", compile_and_launch)
    monkeypatch.setitem(kernel.__dict__, "_kinds", [kernel_module._POINTER])
    x = torch.ones(4)
    for device, stream in ((0, 7), (0, 7), (0, 8), (1, 9), (1, 9), (0, 7)):
        now.update(device=device, stream=stream)
        kernel(config, (1, 1, 1), x)
    assert compiled == [0, 1]
    assert launched == [(d, (d, s), f"code for {d}") for d, s in ((0, 7), (0, 8), (1, 9), (0, 7))]


def test_auto_without_the_extension_takes_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU machine without compiled CUDA kernels."""
    reason = "fastlm was built without CUDA kernels"
    missing = {"cuda": lambda: reason, "triton": lambda: None}
    for name, available in missing.items():
        monkeypatch.setitem(registry._availability, name, available)
        monkeypatch.setitem(registry._DEVICE_TYPE, name, "cuda")
    x, weight = torch.ones(2, 8), torch.ones(8, 8)
    for op, call in (("layer_norm", (x, weight[0], None, None, 1e-5, False)), ("linear", (x, weight, None))):
        explanation = registry.explain_call(op, "cuda", call)
        assert explanation.chosen == "triton" == registry.choose(op, "cuda", call)
        assert explanation.reasons["cuda"] == reason and reason in str(explanation)
    wide = registry.explain_call("linear", "cuda", (x.double(), weight.double(), None))
    assert wide.chosen == "reference" and "got torch.float64" in str(wide)
