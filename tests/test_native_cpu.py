"""The compiled module by itself: what it says of itself, its instruction sets, its threads, its conversions.

The kernels' numbers against the reference are the op suite's (test_ops.py).
"""

from __future__ import annotations

import array
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm.ops import native

_C = pytest.importorskip("fastlm._C", reason="fastlm._C is not built: python setup.py build_ext --inplace")
MODULE = Path(_C.__file__)
ISAS = _C.build_info()["cpu_isas"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_build_info():
    info = _C.build_info()
    assert info["version"] == fastlm.__version__
    assert info["cpu_isas"][0] == "baseline"
    assert info["compiler"]
    if info["cuda"]:
        assert info["cuda_archs"] and info["cuda_reason"] is None
    else:
        assert info["cuda_archs"] == [] and info["cuda_reason"]
        assert native.cuda_unavailable() == f"fastlm was built without CUDA: {info['cuda_reason']}"


def test_cpu():
    assert _C.cpu_isas()[0] == "baseline"
    assert _C.cpu_isa() == os.environ.get("FASTLM_CPU_ISA", _C.cpu_isas()[-1])
    assert _C.cpu_name()
    if "avx2" in _C.cpu_isas():
        assert {"avx2", "fma", "f16c"} <= set(_C.cpu_features())


def test_brings_no_runtime_of_its_own():
    """A second OpenMP runtime in the process would fight torch's for the cores; cudart is linked statically."""
    binary = MODULE.read_bytes()
    for library in (b"libgomp", b"libomp", b"libiomp5", b"libcudart.so", b"libcuda.so"):
        assert library + b"\0" not in binary and library + b".so" not in binary, library


def test_threads_are_torchs(threads):
    for n in (1, 2, 3):
        threads(n)
        assert _C.max_threads() == n


# Run in a process of its own, since an instruction set is chosen once a process; without torch (and so without OpenMP),
# which is quick. Adds a zero residual of 16 bits to float numbers: h is their conversion. And a norm and its gradients.
SCRIPT = """
import importlib.util, json, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(C)
at = lambda a: 0 if a is None else a.ctypes.data
rng = np.random.default_rng(0)

def convert(x, code):
    n, h, y, one = x.size, np.zeros(x.size, np.uint16), np.empty_like(x), np.ones(x.size, np.float32)
    zero, stats = np.zeros(n, np.uint16), np.empty((2, 1), np.float32)
    C.layer_norm_forward(False, at(x), at(zero), at(one), 0, at(y), at(h), at(stats[0]), at(stats[1]), 1, n, n, n, 1e-5,
                         False, 0, code, 0, 0)
    return h

bits = rng.integers(0, 2**32, 200_003, dtype=np.uint64).astype(np.uint32)
half = np.arange(0, 2**16, dtype=np.uint16).view(np.float16).astype(np.float32)  # every f16, and the halfways between
with np.errstate(all="ignore"):
    near = np.concatenate([half, half * np.float32(1 + 2**-11), half * np.float32(1 + 2**-12)]).astype(np.float32)
x = np.concatenate([bits.view(np.float32), near, np.float32([0, -0.0, np.inf, -np.inf, np.nan, 65519.9, 65520, 1e-40])])
result = {"isa": C.cpu_isa()}

h = convert(x, 1)
with np.errstate(all="ignore"):
    wanted = (x + np.float32(0)).astype(np.float16)
same = (h == wanted.view(np.uint16)) | (np.isnan(h.view(np.float16)) & np.isnan(wanted))
result["f16_wrong"] = x[~same][:5].tolist()

h = convert(x, 2)
u = (x + np.float32(0)).view(np.uint32).astype(np.uint64)
wanted = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
is_nan = lambda b: (b & 0x7FFF) > 0x7F80
same = np.where(np.isnan(x), is_nan(h), h == wanted)
result["bf16_wrong"] = x[~same][:5].tolist()

worst = 0.0
for rows, cols in [(1, 1), (3, 5), (37, 129), (70, 768)]:
    x, dy = rng.standard_normal((2, rows, cols)).astype(np.float32)
    w, b = rng.standard_normal((2, cols)).astype(np.float32)
    y, dx = np.empty((2, rows, cols), np.float32)
    mean, rstd = np.empty((2, rows), np.float32)
    dw, db = np.empty((2, cols), np.float32)
    work = np.empty(C.layer_norm_backward_workspace(False, rows, cols, 0), np.float32)
    C.layer_norm_forward(False, at(x), 0, at(w), at(b), at(y), 0, at(mean), at(rstd), rows, cols, cols, 0, 1e-5, False,
                         0, 0, 0, 0)
    C.layer_norm_backward(False, at(dy), 0, at(x), at(w), at(mean), at(rstd), at(dx), 0, at(dw), at(db), at(work), rows,
                          cols, cols, 0, cols, False, 0, 0, 0, 0, 0)
    X, G = x.astype(float), (dy * w).astype(float)
    r = 1 / np.sqrt(X.var(1, keepdims=True) + 1e-5)
    N = (X - X.mean(1, keepdims=True)) * r
    DX = r * (G - G.mean(1, keepdims=True) - N * (G * N).mean(1, keepdims=True))
    for got, want in [(y, N * w + b), (dx, DX), (dw, (dy * N).sum(0)), (db, dy.astype(float).sum(0))]:
        worst = max(worst, float(np.abs(got - want).max() / max(1, np.abs(want).max())))
result["worst"] = worst
print(json.dumps(result))
"""


def run_with(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FASTLM_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", SCRIPT, str(MODULE)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    done = run_with(isa)
    if isa not in _C.cpu_isas():
        assert done.returncode == 1
        assert f"RuntimeError: FASTLM_CPU_ISA={isa}: this processor" in done.stderr and "it can run: " in done.stderr
        return
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["isa"] == isa
    assert result["f16_wrong"] == [] and result["bf16_wrong"] == []
    assert result["worst"] < 2e-6


def test_unknown_instruction_set():
    done = run_with("sse9")
    assert "ValueError: FASTLM_CPU_ISA=sse9 is not an instruction set of this build; wanted one of: " in done.stderr


def test_an_instruction_set_that_cannot_be_had_is_not_passed_over():
    script = "import torch, fastlm; fastlm.ops.layer_norm(torch.ones(2, 8), torch.ones(8))"
    environment = {**os.environ, "FASTLM_CPU_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "UnsupportedError: FASTLM_CPU_ISA=sse9 is not an instruction set of this build" in done.stderr


def layer_norm(x, residual, weight, bias, dy):
    """Everything that the two kernels write, as bytes."""
    code = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
    rows, cols = x.shape
    types = code[x.dtype], code[residual.dtype], code[weight.dtype]
    y, dx = torch.empty_like(x), torch.empty_like(x)
    h, dh = torch.empty_like(residual), torch.empty_like(residual)
    mean, rstd, dweight, dbias = torch.empty(rows), torch.empty(rows), torch.empty_like(weight), torch.empty_like(bias)
    work = torch.empty(_C.layer_norm_backward_workspace(False, rows, cols, 0))
    pointers = [t.data_ptr() for t in (x, residual, weight, bias, y, h, mean, rstd)]
    _C.layer_norm_forward(False, *pointers, rows, cols, cols, cols, 1e-5, False, *types, 0)
    pointers = [t.data_ptr() for t in (dy, h, h, weight, mean, rstd, dx, dh, dweight, dbias, work)]
    _C.layer_norm_backward(False, *pointers, rows, cols, cols, cols, cols, False, *types, 0, 0)
    return [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (y, h, mean, rstd, dx, dh, dweight, dbias)]


@pytest.mark.parametrize("x_type, h_type", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_layer_norm_has_the_same_bits_for_any_number_of_threads(threads, x_type, h_type):
    torch.manual_seed(0)
    rows, cols = 517, 771
    x, dy = torch.randn(rows, cols).to(x_type), torch.randn(rows, cols).to(x_type)
    residual, weight, bias = torch.randn(rows, cols).to(h_type), torch.randn(cols), torch.randn(cols)
    results = []
    for n in (1, 2, 3, 5):
        threads(n)
        results.append(layer_norm(x, residual, weight, bias, dy))
    assert all(result == results[0] for result in results)


def test_layer_norm_with_no_rows():
    cols = 5
    dweight, dbias, weight = torch.full((cols,), 7.0), torch.full((cols,), 7.0), torch.ones(cols)
    assert _C.layer_norm_backward_workspace(False, 0, cols, 0) == 0
    pointers = [0, 0, 0, weight.data_ptr(), 0, 0, 0, 0, dweight.data_ptr(), dbias.data_ptr(), 0]
    _C.layer_norm_backward(False, *pointers, 0, cols, cols, cols, cols, False, 0, 0, 0, 0, 0)
    assert not dweight.any() and not dbias.any()


def test_bad_arguments():
    with pytest.raises(ValueError, match="dtype code 7"):
        _C.layer_norm_forward(False, *[0] * 8, 1, 4, 4, 4, 1e-5, False, 7, 0, 0, 0)
    with pytest.raises(ValueError, match="cols >= 1"):
        _C.layer_norm_forward(False, *[0] * 8, 1, 0, 4, 4, 1e-5, False, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="residual and h come together"):
        _C.layer_norm_forward(False, 16, 16, *[0] * 6, 1, 4, 4, 4, 1e-5, False, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="9 int64 a tensor, got 8 items of 8 bytes"):
        _C.adamw_step(array.array("q", [0] * 8), 1e-3, 0.9, 0.999, 1e-8, 0.0, 1, 1.0, False)
    with pytest.raises(ValueError, match="counted from 1"):
        _C.adamw_step(array.array("q"), 1e-3, 0.9, 0.999, 1e-8, 0.0, 0, 1.0, False)


@pytest.mark.skipif(_C.build_info()["cuda"] is not None, reason="this build has CUDA")
def test_without_cuda_a_cuda_call_says_why():
    with pytest.raises(RuntimeError, match="fastlm was built without CUDA: "):
        _C.layer_norm_backward_workspace(True, 1, 1, 1)


def adamw(params, grads, amsgrad, n_steps):
    """fastlm's step on copies of `params`; the parameters and their bf16 shadows."""
    code = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
    params = [p.clone() for p in params]
    states = [[torch.zeros(p.shape) for _ in range(3)] for p in params]
    shadows = [torch.empty(p.shape, dtype=torch.bfloat16) for p in params]
    for step in range(1, n_steps + 1):
        table = array.array("q")
        for p, g, (m, v, v_max), shadow in zip(params, grads, states, shadows, strict=True):
            table.extend([p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), v_max.data_ptr() if amsgrad else 0])
            table.extend([shadow.data_ptr(), p.numel(), code[p.dtype], code[g.dtype]])
        _C.adamw_step(table, 1e-2, 0.9, 0.95, 1e-8, 0.1, step, 0.5, True)
    return params, shadows


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_is_torchs(threads, amsgrad):
    torch.manual_seed(0)
    shapes = [(3,), (5000,), (0,), (100, 100), (1,), (3 * 4096 + 7,)]
    params = [torch.randn(s) for s in shapes]
    grads = [torch.randn(s) * 10.0 ** torch.randint(-6, 6, ()).item() for s in shapes]
    theirs = [p.clone().requires_grad_() for p in params]
    for p, g in zip(theirs, grads, strict=True):
        p.grad = 0.5 * g
    optimizer = torch.optim.AdamW(
        theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, amsgrad=amsgrad, maximize=True, foreach=False
    )
    for _ in range(5):
        optimizer.step()
    for n in (1, 3):
        threads(n)
        ours, shadows = adamw(params, grads, amsgrad, 5)
        for p, q, shadow in zip(ours, theirs, shadows, strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=1e-6, atol=1e-6)
            assert torch.equal(shadow, p.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adamw_of_16_bit_parameters_rounds_the_float_step(dtype):
    torch.manual_seed(0)
    params, grads = [torch.randn(1000).to(dtype)], [torch.randn(1000).to(dtype)]
    (ours,), _ = adamw(params, grads, False, 1)
    (wide,), _ = adamw([params[0].float()], [grads[0].float()], False, 1)
    assert torch.equal(ours, wide.to(dtype))
