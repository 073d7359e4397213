"""What PyTorch's other parts do around the ops: in-place writes, default dtypes and devices, tracers, hooks, forks."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm
import fastlm.nn
from fastlm import ops
from fastlm.models.lora import add_lora
from fastlm.ops import memory, native
from fastlm.ops.case import Case, Maker, differentiable
from tests.op_suite import first_cases, outputs_of

needs_cpu_kernels = pytest.mark.skipif(native.cpu_unavailable() is not None, reason=str(native.cpu_unavailable()))


def call_of(case: Case) -> tuple[Any, dict[str, Any]]:
    return getattr(ops, case.op), case.build(Maker())


# The small and the large way of a product: rows that go to C++ one by one, and those that go to the library.
@pytest.mark.parametrize("rows", [4, 600])
@pytest.mark.parametrize("op", ["linear", "linear_act", "mlp", "layer_norm", "loss"])
def test_results_can_be_written_in_place(op: str, rows: int) -> None:
    x = torch.randn(2, rows, 48, requires_grad=True)
    fc, proj = torch.randn(192, 48), torch.randn(48, 192)
    functions = {
        "linear": lambda: ops.linear(x, fc),
        "linear_act": lambda: ops.linear_act(x, fc, activation="gelu"),
        "mlp": lambda: ops.mlp(x, fc, None, proj, None),
        "layer_norm": lambda: ops.layer_norm(x, torch.ones(48)),
        "loss": lambda: ops.linear_cross_entropy(x, fc, torch.zeros(2, rows, dtype=torch.int64), reduction="none"),
    }
    (wanted,) = torch.autograd.grad((functions[op]() * 3).sum(), x)
    y = functions[op]()
    y *= 3
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, wanted)


def test_lora_on_a_batch_of_any_size() -> None:
    model = fastlm.GPT(fastlm.GPTConfig(vocab_size=50, block_size=512, n_layer=1, n_head=2, n_embd=384))
    add_lora(model, rank=2, alpha=4)
    for tokens in (8, 512):
        model(torch.zeros(1, tokens, dtype=torch.int64), torch.zeros(1, tokens, dtype=torch.int64))[1].backward()


@pytest.mark.parametrize("case", first_cases(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_changes_nothing(case: Case, dtype: torch.dtype) -> None:
    if "in-place" in case.traits:
        pytest.skip("it has no result")
    torch.manual_seed(0)
    op, arguments = call_of(case)
    wanted = outputs_of(op(**arguments))
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        got = outputs_of(op(**arguments))
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("case", first_cases(), ids=str)
def test_the_default_device_changes_nothing(case: Case) -> None:
    if "in-place" in case.traits:
        pytest.skip("it has no result")
    op, arguments = call_of(case)
    leaves = {name: t.detach().requires_grad_() for name, t in differentiable(arguments).items()}
    with torch.device("meta"):
        outputs = outputs_of(op(**{**arguments, **leaves}))
        assert all(o.is_cpu for o in outputs)
        smooth = [o for o in outputs if o.requires_grad]
        if smooth:
            torch.autograd.grad(smooth, list(leaves.values()), [o.detach() for o in smooth], allow_unused=True)


@needs_cpu_kernels
def test_large_results_of_many_dimensions() -> None:
    x = torch.randn(2, 1, 1, 3, 1, 1, 1, 40, 1, 512)
    torch.testing.assert_close(ops.layer_norm(x, torch.ones(512)), nn.functional.layer_norm(x, (512,)))
    assert memory.empty((1,) * 8 + (1 << 18,), torch.float32).shape == (1,) * 8 + (1 << 18,)


def test_what_is_written_through_addresses_counts_as_written() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = fastlm.optim.AdamW(net.parameters(), lr=0.1)
    x = torch.randn(4, 4)
    first, second = net(x).sum(), net(x).square().sum()
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()

    q, k, angles = torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4), torch.randn(3, 2)
    y = q * torch.ones(1, 3, 1, 4, requires_grad=True)
    with torch.no_grad():
        ops.rotary(q, k, angles, angles, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        ops.rotary(q * 1, k * 1, angles, angles, inplace=True)


@pytest.mark.filterwarnings("ignore")  # that shapes become constants
@pytest.mark.parametrize("case", first_cases(), ids=str)
def test_torch_jit_trace(case: Case) -> None:
    if case.traits & {"in-place", "random"}:
        pytest.skip("there is nothing to compare")
    op, arguments = call_of(case)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

    def function(*tensors: Tensor) -> Any:
        return op(**{**arguments, **dict(zip(names, tensors, strict=True))})

    inputs = tuple(arguments[name] for name in names)
    with torch.no_grad():
        if case.op == "linear_cross_entropy":  # a tracer of torch's that has no future
            with pytest.raises(RuntimeError, match="a list of bool"):
                torch.jit.trace(function, inputs, check_trace=False)
            return
        traced = torch.jit.trace(function, inputs, check_trace=False)
        for got, wanted in zip(outputs_of(traced(*inputs)), outputs_of(function(*inputs)), strict=True):
            assert torch.equal(got, wanted)


def test_a_gradient_that_the_dispatcher_cannot_give_is_an_error() -> None:
    nets = [nn.Sequential(nn.Linear(8, 16), fastlm.nn.LayerNorm(16)) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(nets)
    x = torch.randn(4, 8)

    def one(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(nets[0], (parameters, buffers), (x,))

    y = torch.vmap(one)(parameters, buffers)
    torch.testing.assert_close(y[1], nets[1](x))
    with pytest.raises(NotImplementedError, match="layer_norm_forward has no derivative below"):
        y.sum().backward()

    module = fastlm.nn.MLP(8, 16)
    exported = torch.export.export(module, (x,)).module()
    y = exported(x)
    torch.testing.assert_close(y, module(x))
    with pytest.raises(RuntimeError, match=r"mlp_forward has no derivative below|does not require grad"):  # torch 2.6
        y.sum().backward()


def test_hooks_on_a_tied_embedding_run_in_the_loss_too() -> None:
    model = fastlm.GPT(fastlm.GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=1, n_embd=8))
    idx = torch.randint(20, (2, 8))
    handle = model.wte.register_forward_hook(lambda module, given, out: out * 2)
    logits, _ = model(idx)
    loss = model(idx, idx)[1]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten()))
    handle.remove()
    assert not torch.equal(loss, model(idx, idx)[1])
    seen: list[int] = []
    model.wte.register_full_backward_hook(lambda *_: seen.append(1))
    model(idx, idx)[1].backward()
    assert seen == [1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_norm_of_gradients_in_a_compiled_function(backend: str) -> None:
    parameter = nn.Parameter(torch.zeros(300, 700))

    def norm(scale: Tensor) -> Tensor:
        (parameter * scale).sum().backward()
        found = fastlm.optim.clip_grad_norm([parameter], 1.0).norm
        parameter.grad = None
        return found

    compiled = torch.compile(norm, backend=backend)
    for scale in range(1, 9):
        wanted = scale * parameter.numel() ** 0.5
        torch.testing.assert_close(compiled(torch.tensor(float(scale))), torch.tensor(wanted), rtol=1e-5, atol=0)


def test_the_norm_of_gradients_has_no_tangent() -> None:
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="grad_norm has no forward"):
        ops.grad_norm([torch.autograd.forward_ad.make_dual(torch.ones(4), torch.ones(4))], 1.0)


def test_the_norm_of_gradients_in_a_traced_graph() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda g: ops.grad_norm([g], 1.0)[0])(torch.ones(4))
    assert graph(torch.full((4,), 3.0)) == 6.0


FORKS = """
import os, signal, threading, torch
from fastlm.ops import memory
memory.set_limit(0)  # every tensor that dies is given back to the system, with the pool's lock held
stop = False
def churn():
    x = torch.randn(256, 512, requires_grad=True)
    while not stop:
        kept = [memory.empty((256, 512), torch.float32).copy_(x.detach()) for _ in range(8)]
        y = x
        for t in kept:
            y = y * t  # a node in C++ keeps it, and drops it without the interpreter's lock
        del kept, t
        y.sum().backward()
threads = [threading.Thread(target=churn) for _ in range(2)]
for t in threads: t.start()
for _ in range(150):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits for ever is killed, and its status says so
        memory.empty((256, 512), torch.float32)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status: break
stop = True
for t in threads: t.join()
print("hung" if status else "done")
"""


@needs_cpu_kernels
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_can_use_the_pool() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("case", first_cases(), ids=lambda c: c.op)
def test_a_tensor_that_has_outlived_a_transform(case: Case) -> None:
    """functorch's wrapper is still around it; torch's own functions take it."""
    arguments = case.build(Maker())
    if "in-place" in case.traits or not differentiable(arguments):
        pytest.skip("nothing that a transform would have differentiated")
    name = next(iter(differentiable(arguments)))
    kept: list[torch.Tensor] = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        kept.append(torch.tanh(x))
        return kept[-1].sum()

    torch.func.grad(inside)(arguments[name])
    others = {k: v.detach().requires_grad_() for k, v in differentiable(arguments).items() if k != name}
    plain = torch.tanh(arguments[name])
    wanted, got = (outputs_of(getattr(ops, case.op)(**{**arguments, **others, name: x})) for x in (plain, kept[0]))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", first_cases(), ids=lambda c: c.op)
def test_a_second_derivative_is_refused_whatever_the_gradient_that_came_in(case: Case) -> None:
    """A loss's own gradient requires none: a penalty on the gradients was gone in silence."""
    op, arguments = call_of(case)
    leaves = {name: t.detach().requires_grad_() for name, t in differentiable(arguments).items()}
    smooth = [t for t in outputs_of(op(**{**arguments, **leaves})) if t.requires_grad] if leaves else []
    if not smooth:
        pytest.skip("it has no first derivative")
    loss = sum(t.sum() for t in smooth)
    gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(g.square().sum() for g in gradients if g is not None).backward()


@pytest.mark.parametrize("case", first_cases(), ids=lambda c: c.op)
def test_on_meta_tensors_there_are_shapes(case: Case) -> None:
    op, arguments = call_of(case)
    if "in-place" in case.traits:
        pytest.skip("nothing comes back")
    with torch.no_grad():
        wanted = outputs_of(op(**arguments))
        made = outputs_of(
            op(**{k: v.to("meta") if isinstance(v, Tensor) else _on_meta(v) for k, v in arguments.items()})
        )
    for a, b in zip(made, wanted, strict=True):
        assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)


def _on_meta(value: Any) -> Any:
    return [t.to("meta") for t in value] if isinstance(value, list) else value
