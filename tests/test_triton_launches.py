"""Launches of the Triton kernels: one graph under torch.compile, no wait for the GPU, nothing compiled for a new length.

The launches are those of meta tensors, as of the architecture that is named; nothing is computed, and no GPU is needed.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import fastlm
from fastlm import ops
from fastlm.ops import registry
from fastlm.ops.attention import triton as attention
from fastlm.ops.case import Maker
from fastlm.ops.layer_norm import triton as layer_norm
from fastlm.ops.mlp import triton as mlp
from fastlm.ops.triton_support import INTERPRETED, ahead
from fastlm.ops.triton_support.kernel import Example
from fastlm.ops.triton_support.target import pretend
from tests.op_suite import first_cases, run

META = torch.device("meta")


@pytest.mark.skipif(not INTERPRETED, reason="compares with tensors on the CPU")
@pytest.mark.parametrize("op", ["layer_norm", "attention", "mlp", "linear_cross_entropy"])
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
            assert result.device.type == args[-1].device.type == "meta", f"{name} to another device"
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


def _norm(length: int) -> None:
    x, weight = torch.ones(2, length, 768, device=META), torch.ones(768, device=META)
    y, _, statistics = layer_norm.forward(x, weight, weight, None, 1e-5, False)
    layer_norm.backward(y, None, x, weight, statistics, True, False)


def _mlp(length: int) -> None:
    x, weight = torch.ones(4, length, 768, device=META).half(), torch.ones(3072, 768, device=META).half()
    y, pre = mlp.mlp_forward(x, weight, None, weight.T.contiguous(), None, "gelu_tanh", True)
    mlp.mlp_backward(y, x, weight, weight.T.contiguous(), pre, "gelu_tanh", [True, True, False, True, False])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("call", [_norm, _mlp], ids=["layer_norm", "mlp"])
def test_a_new_sequence_length_makes_no_new_kernel(arch: str, call) -> None:
    """Among lengths that take the same tiles (matrix products have tiles for up to three numbers of rows)."""
    with pretend(arch):
        kernels = set()
        for length in (1000, 1024, 1111, 1536, 2047):
            found = ahead._record(Example(f"{length}", lambda length=length: call(length)), None).launches
            kernels.add(frozenset((kernel, kernel._key(0, config, arguments)) for kernel, config, arguments in found))
    assert len(kernels) == 1


def test_auto_without_the_extension_goes_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU machine without compiled CUDA kernels: Triton where it has a kernel, else plain PyTorch, and both said."""
    reason = "fastlm was built without CUDA kernels"
    missing = {"cuda": lambda: reason, "triton": lambda: None}
    for name, available in missing.items():
        monkeypatch.setitem(registry._availability, name, available)
        monkeypatch.setitem(registry._DEVICE_TYPE, name, "cuda")
    x, weight = torch.ones(2, 8), torch.ones(8, 8)
    norm = registry.explain_call("layer_norm", "cuda", (x, weight[0], None, None, 1e-5, False))
    assert norm.chosen == "triton" and norm.reasons["cuda"] == reason
    linear = registry.explain_call("linear", "cuda", (x, weight, None))
    assert linear.chosen == "reference" == registry.choose("linear", "cuda", (x, weight, None))
    assert "no triton kernel for linear" in str(linear) and reason in str(linear)


def test_positions_in_large_tensors_take_64_bits() -> None:
    """A batch of more than 2^31 elements: strides and rows are handed over whole."""
    with pretend("sm_90"):
        x = torch.empty(2**31 // 4096 + 1, 4096, device=META, dtype=torch.bfloat16)
        weight = torch.ones(4096, device=META, dtype=torch.bfloat16)
        call = Example("", lambda: layer_norm.forward(x, weight, None, None, 1e-5, True))
        ((kernel, _, _),) = ahead._record(call, None).launches
    types = {p.name: p.annotation for p in kernel.function.params if p.name.endswith("stride") or p.name == "rows"}
    assert types and set(types.values()) == {"i64"}, types


def test_attention_reads_lengths_on_the_device() -> None:
    assert any("packed" in example.name for example in attention.examples(META))
