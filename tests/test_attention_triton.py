"""What is special to attention in Triton; its cases run in the common suite, interpreted where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastlm
from fastlm.ops import attention, attention_qkvpacked, registry
from fastlm.ops.attention import triton
from fastlm.ops.attention.cases import slices
from fastlm.ops.triton_support import INTERPRETED

COMPILE = """
from fastlm.ops.triton_support import ahead
wanted = "attention 64 bfloat16 causal"
for launch in ahead.launches("sm_90", ["attention"]):
    if launch.example == wanted and launch.kernel.label == "attention.forward":
        done = ahead.compile_launch(launch, "sm_90")
        print(done.problem(), *sorted(done.instructions))
        break
"""


@pytest.mark.skipif(registry.unavailable("triton") is not None, reason=str(registry.unavailable("triton")))
def test_forward_for_hopper_uses_warp_groups_and_the_tma() -> None:
    """In its own process: in this one kernels may be interpreted, and then nothing is compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    problem, *instructions = done.stdout.split()
    assert problem == "None", done.stdout
    assert {"wgmma.mma_async", "cp.async.bulk.tensor"} <= set(instructions)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the common suite takes this path itself")
def test_descriptors_read_what_pointers_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of Hopper, in the interpreter: lengths and head dim that no block divides."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 70, 2, 24, generator=generator).bfloat16().requires_grad_()
    k, v = (torch.randn(1, 140, 1, 24, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    results = []
    with fastlm.backend("triton"):
        for arch in ("sm_80", "sm_90"):
            monkeypatch.setattr(triton, "architecture", lambda device, arch=arch: arch)
            assert triton._describable(q, k, v) == (arch == "sm_90")
            out = attention(q, k, v, causal=True)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for pointers, descriptors in zip(*results, strict=True):
        assert torch.equal(pointers, descriptors)


@pytest.mark.skipif(not INTERPRETED, reason="compares with tensors on the CPU")
@pytest.mark.parametrize("lengths", [(), (13, 0, 27)], ids=["batch", "sequences"])
def test_a_packed_gradient_has_the_bits_of_three(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1 if lengths else 2, 40, (4 + 2 * 2) * 24, generator=generator).bfloat16().requires_grad_()
    ends = torch.tensor([0, *lengths]).cumsum(0).int() if lengths else None
    with fastlm.backend("triton"):
        out = attention_qkvpacked(qkv, 4, 2, causal=True, cu_seqlens=ends)
        upstream = torch.randn(out.shape, generator=generator).bfloat16()
        (packed,) = torch.autograd.grad(out, qkv, upstream)
        out = attention(*slices(qkv, 4, 2), causal=True, cu_seqlens=ends)
        (wanted,) = torch.autograd.grad(out, qkv, upstream)
    assert torch.equal(packed, wanted)


def test_what_it_refuses() -> None:
    q = torch.empty(1, 2, 1, 264)
    assert "head dims up to 256, got 264" in (triton.unsupported(q, q) or "")
    assert "float64" in (triton.unsupported(q[..., :64].double(), q) or "")
    assert "float32 kernels are for head dims up to 128, got 256" in (triton.unsupported(q[..., :256], q) or "")
    assert triton.unsupported(q[..., :128], q) is None and triton.unsupported(q[..., :256].half(), q) is None
