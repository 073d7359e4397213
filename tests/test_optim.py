"""fastlm.optim.AdamW against torch.optim.AdamW: the same parameters, moments and state dicts, backend by backend."""

from __future__ import annotations

import copy
import itertools
from array import array
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm
from fastlm import ops
from fastlm.ops import native, registry
from fastlm.ops.adamw import native as adamw_native
from fastlm.optim import AdamW
from tests.op_suite import check

BACKENDS = ["reference", "cpu", "emulator", "triton"]
SHAPES = [(5, 7), (3,), (), (4096 + 17,), (2, 3, 8), (0, 4), (1,)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-decay": {"weight_decay": 0.0},
    "other-numbers": {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.5)},
    "maximize": {"maximize": True},
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    reason = registry.unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    with fastlm.backend(request.param):
        yield request.param


def parameters(dtype: torch.dtype = torch.float32, shapes: list = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def copies(params: list[nn.Parameter], dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(dtype, copy=True)) for p in params]


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    """Gradients of several magnitudes, exact in bfloat16, so that every dtype sees the same numbers."""
    generator = torch.Generator().manual_seed(100 + step)
    return [
        (torch.randn(p.shape, generator=generator) * 10.0 ** (i % 4 - 2)).bfloat16().float()
        for i, p in enumerate(params)
    ]


def train(optimizer: torch.optim.Optimizer, steps: range, scale: float = 1.0, **options: Any) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = (g * scale).to(p.dtype)
        optimizer.step(**options)


def all_states(optimizer: torch.optim.Optimizer, key: str) -> list[Tensor]:
    return [optimizer.state[p][key] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_torch_in_float32(backend: str, options: dict) -> None:
    ours, eager = parameters(), parameters()
    exact = copies(ours, torch.float64)
    optimizer = AdamW(ours, **options)
    textbook = torch.optim.AdamW(eager, foreach=False, **options)
    oracle = torch.optim.AdamW(exact, foreach=False, **options)
    for o in (optimizer, textbook, oracle):
        train(o, range(6))
    keys = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if options.get("amsgrad") else [])
    for i, (p, e, q) in enumerate(zip(ours, eager, exact, strict=True)):
        check(f"parameter {i}", p.detach(), q.detach(), e.detach(), torch.float32)
        for key in keys:
            check(key, optimizer.state[p][key], oracle.state[q][key], textbook.state[e][key], torch.float32)
    assert all(step.item() == 6 for step in all_states(optimizer, "step"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_torch_in_float64(options: dict) -> None:
    ours, exact = parameters(torch.float64), parameters(torch.float64)
    train(AdamW(ours, **options), range(6))
    train(torch.optim.AdamW(exact, foreach=False, **options), range(6))
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-15)


def test_the_cpu_kernel_is_not_for_float64() -> None:
    optimizer = AdamW(parameters(torch.float64, [(3,)]))
    with fastlm.backend("cpu"), pytest.raises(fastlm.UnsupportedError, match=r"cannot run adamw here: "):
        train(optimizer, range(1))
    assert all(step.item() == 0 for step in all_states(optimizer, "step"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_parameters_have_float32_moments(backend: str, dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    exact = copies(ours, torch.float64)
    optimizer, oracle = AdamW(ours, lr=0.1), torch.optim.AdamW(exact, lr=0.1, foreach=False)
    # one step: the parameter is the oracle's, rounded once (or, where that is nearly a tie, to the neighbour)
    train(optimizer, range(1), scale=2.0**-6)
    train(oracle, range(1), scale=2.0**-6)
    for p, q in zip(ours, exact, strict=True):
        unit = torch.finfo(dtype).eps * q.detach().abs()
        assert (p.detach().double() - q.detach()).abs().le(0.501 * unit + 1e-7).all()
        torch.testing.assert_close(
            optimizer.state[p]["exp_avg"].double(), oracle.state[q]["exp_avg"], rtol=1e-3, atol=1e-7
        )
        assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_master_weights_add_up_steps_that_the_dtype_cannot_hold(backend: str, dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    single = copies(ours, torch.float32)
    lost = copies(ours, dtype)
    options: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0}
    optimizer = AdamW(ours, master_weights=True, **options)
    for o in (optimizer, AdamW(single, **options), AdamW(lost, **options)):
        for _ in range(8 if backend == "triton" else 40):
            for group in o.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            o.step()
    for p, s in zip(ours, single, strict=True):
        assert torch.equal(optimizer.state[p]["master"], s.detach())
        assert torch.equal(p.detach(), s.detach().to(dtype))
    assert not torch.equal(ours[0], lost[0])


def test_bfloat16_gradients_of_float32_parameters(backend: str) -> None:
    """The op takes gradients in another dtype than the parameter's (torch's own p.grad does not)."""
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p, g = torch.linspace(-1, 1, 33), torch.linspace(1, 2, 33).bfloat16().float().half().float()
        m, v = torch.zeros(33), torch.zeros(33)
        ops.adamw_([p], [g.to(dtype)], [m], [v], step=1, lr=0.1)
        results.append((p, m, v))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_groups_have_their_own_options(backend: str) -> None:
    def groups(params: list[nn.Parameter]) -> list[dict]:
        return [
            {"params": params[:3], "weight_decay": 0.2},
            {"params": params[3:5], "lr": 0.05, "betas": (0.5, 0.6)},
            {"params": params[5:], "maximize": True, "amsgrad": True},
        ]

    ours, eager = parameters(), parameters()
    train(AdamW(groups(ours), lr=0.01), range(4))
    train(torch.optim.AdamW(groups(eager), lr=0.01, foreach=False), range(4))
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-7)


def test_a_scheduler_and_a_tensor_lr(backend: str) -> None:
    results = []
    for cls, lr in ((AdamW, 0.1), (AdamW, torch.tensor(0.1)), (torch.optim.AdamW, 0.1)):
        params = parameters()
        optimizer = cls(params, lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(4):
            train(optimizer, range(step, step + 1))
            scheduler.step()
        results.append(params)
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(results[1], results[2], rtol=1e-5, atol=1e-7)


def test_frozen_parameters_and_missing_gradients(backend: str) -> None:
    """A parameter without a gradient is left alone, and counts its own steps when it joins later."""
    ours, eager = parameters(), parameters()
    for params, cls in ((ours, AdamW), (eager, torch.optim.AdamW)):
        optimizer = cls(params, lr=0.1)
        params[0].requires_grad_(False)
        for step in range(5):
            for i, (p, g) in enumerate(zip(params, gradients(params, step), strict=True)):
                p.grad = None if i == 0 or (i == 1 and step < 3) else g
            optimizer.step()
        assert params[0] not in optimizer.state
        assert optimizer.state[params[1]]["step"].item() == 2 and optimizer.state[params[2]]["step"].item() == 5
    assert torch.equal(ours[0], parameters()[0])
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-7)


def test_no_gradient_at_all_is_no_step() -> None:
    optimizer = AdamW(parameters())
    optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("master_weights", [False, True])
def test_strided_parameters_and_gradients(backend: str, dtype: torch.dtype, master_weights: bool) -> None:
    base = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    grad = torch.randn(6, 40, generator=torch.Generator().manual_seed(4)).to(dtype)
    layouts = {
        "contiguous": lambda t: t[:, 1:30].contiguous(),
        "sliced": lambda t: t.clone()[:, 1:30],
        "transposed": lambda t: t[:, 1:30].t().contiguous().t(),
    }
    results = []
    for layout in layouts.values():
        for grad_layout in layouts.values():
            p = layout(base).requires_grad_()
            optimizer = AdamW([p], lr=0.1, master_weights=master_weights)
            for _ in range(3):
                p.grad = grad_layout(grad)
                optimizer.step()
            results.append(p.detach())
    assert len(results) == 9 and all(torch.equal(r, results[0]) for r in results)


def test_gradients_are_left_alone(backend: str) -> None:
    params = parameters()
    train(AdamW(params, maximize=True), range(1), grad_scale=0.5)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients(params, 0), strict=True))


def test_many_small_tensors_are_as_one(backend: str) -> None:
    size = 60 if backend == "triton" else 3000  # a launch each, slow in the interpreter
    whole = torch.randn(size, generator=torch.Generator().manual_seed(0))
    one, many = [nn.Parameter(whole.clone())], [nn.Parameter(t.clone()) for t in whole.split(3)]
    grad = torch.randn(size, generator=torch.Generator().manual_seed(1))
    for params in (one, many):
        optimizer = AdamW(params)
        for _ in range(3):
            for p, g in zip(params, grad.split(3 if len(params) > 1 else size), strict=True):
                p.grad = g
            optimizer.step()
    assert torch.equal(torch.cat([p.detach() for p in many]), one[0].detach())


def test_two_runs_and_any_number_of_threads_give_the_same_bits(backend: str) -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (threads, threads, 1, 2):
            torch.set_num_threads(n)
            params = parameters(shapes=[(300, 257), (40,)])
            train(AdamW(params), range(3))
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_closure_runs_with_gradients_and_its_loss_is_returned(backend: str) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = AdamW([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(5)]
    assert losses[0].item() == 4.0 and losses[-1].item() < 2.0


# State dicts


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("fused", [False, True])
def test_a_torch_state_dict_goes_on_here(backend: str, options: dict, fused: bool) -> None:
    theirs = parameters()
    before = torch.optim.AdamW(theirs, fused=fused, **options)
    train(before, range(3))
    ours = copies(theirs, torch.float32)
    optimizer = AdamW(ours)
    optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
    train(optimizer, range(3, 6))
    train(before, range(3, 6))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert all(step.item() == 6 for step in all_states(optimizer, "step"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("fused", [None, True])
def test_our_state_dict_goes_on_in_torch(backend: str, options: dict, fused: bool | None) -> None:
    ours = parameters()
    before = AdamW(ours, **options)
    train(before, range(3))
    theirs = copies(ours, torch.float32)
    optimizer = torch.optim.AdamW(theirs)
    optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
    for group in optimizer.param_groups:
        group["fused"] = fused
    train(optimizer, range(3, 6))
    train(before, range(3, 6))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_state_dict_has_torch_keys() -> None:
    ours, theirs = AdamW(parameters(), amsgrad=True), torch.optim.AdamW(parameters(), amsgrad=True)
    train(ours, range(1))
    train(theirs, range(1))
    a, b = ours.state_dict(), theirs.state_dict()
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys()
        for name, value in state.items():
            other = b["state"][key][name]
            assert (value.shape, value.dtype, value.device) == (other.shape, other.dtype, other.device), name


@pytest.mark.parametrize("master_weights", [False, True])
def test_resuming_is_exact(backend: str, master_weights: bool, tmp_path: Any) -> None:
    straight, stopped = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer = AdamW(straight, lr=1e-3, master_weights=master_weights)
    train(optimizer, range(6))
    first = AdamW(stopped, lr=1e-3, master_weights=master_weights)
    train(first, range(3))
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    resumed = AdamW(stopped, lr=7.0, master_weights=master_weights)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(resumed, range(3, 6))
    for p, q in zip(straight, stopped, strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][key]) and value.dtype == resumed.state[q][key].dtype, key


def test_loading_copies() -> None:
    first, second = AdamW(parameters()), AdamW(parameters())
    train(first, range(1))
    second.load_state_dict(first.state_dict())
    saved = [m.clone() for m in all_states(first, "exp_avg")]
    train(second, range(1, 3))
    assert all(torch.equal(a, b) for a, b in zip(saved, all_states(first, "exp_avg"), strict=True))
    assert all(step.item() == 1 for step in all_states(first, "step"))


def test_masters_are_made_where_the_state_dict_has_none() -> None:
    theirs = parameters(torch.bfloat16)
    before = torch.optim.AdamW(theirs)
    train(before, range(2))
    optimizer = AdamW(theirs, master_weights=True)
    optimizer.load_state_dict(before.state_dict())
    assert optimizer.param_groups[0]["master_weights"] is True
    train(optimizer, range(2, 3))
    assert all(torch.equal(optimizer.state[p]["master"].bfloat16(), p.detach()) for p in theirs)
    assert all(m.dtype == torch.float32 for m in all_states(optimizer, "exp_avg"))


def test_a_state_of_other_shapes_is_refused() -> None:
    optimizer = AdamW(parameters(shapes=[(3,)]))
    train(optimizer, range(1))
    with pytest.raises(ValueError, match=r"exp_avg has shape \(3,\), its parameter \(4,\)"):
        AdamW(parameters(shapes=[(4,)])).load_state_dict(optimizer.state_dict())


# Clipping


@pytest.mark.parametrize("max_norm", [0.5, 1e3, float("inf")])
def test_clipping_equals_torch(backend: str, max_norm: float) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, eager = AdamW(ours), torch.optim.AdamW(theirs)
    for step in range(4):
        for params in (ours, theirs):
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g
        norm, scale = fastlm.optim.clip_grad_norm(ours, max_norm)
        optimizer.step(grad_scale=scale)
        wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        eager.step()
        torch.testing.assert_close(norm, wanted)
        assert (scale.item() == 1.0) == (max_norm > 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("numel", [0, 1, 4095, 4096, 4097, 300_000, 4096 * 4096 + 1])
def test_the_norm_does_not_depend_on_the_number_of_threads(numel: int) -> None:
    p = nn.Parameter(torch.empty(numel))
    p.grad = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    threads, norms = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            norms.append(fastlm.optim.clip_grad_norm(p, 1.0).norm)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(norms[0], norms[1]) and torch.equal(norms[0], norms[2])
    torch.testing.assert_close(norms[0].double(), p.grad.double().norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_float64(backend: str, dtype: torch.dtype) -> None:
    """Tensors of many sizes, more than a chunk and none, contiguous and not, at odd addresses."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3,), (0,), (4096,), (5, 1000), (4097,), (17,)]
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in sizes]
    tensors += [tensors[3].T, tensors[4][1:]]
    with fastlm.backend("reference"):
        norm, scale = ops.grad_norm([t.double() for t in tensors], 2.0)
    ours = ops.grad_norm(tensors, 2.0)
    torch.testing.assert_close(ours, (norm.float(), scale.float()), rtol=1e-6, atol=0)
    again = ops.grad_norm(tensors, 2.0)
    assert torch.equal(ours[0], again[0]) and torch.equal(ours[1], again[1])


def test_the_cuda_step_is_the_cpus_to_the_bit() -> None:
    results = []
    for name in ("cpu", "emulator"):
        reason = registry.unavailable(name)
        if reason is not None:
            pytest.skip(reason)
        if "avx2" not in fastlm.ops.native.C.cpu_isas():
            pytest.skip("without AVX2 a multiply-add of the CPU rounds twice")
        params = parameters(torch.bfloat16)
        with fastlm.backend(name):
            train(AdamW(params, amsgrad=True, master_weights=True, lr=3e-2), range(3), grad_scale=0.37)
        results.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not native.reads_tensors(), reason="this torch's tensors cannot be read in C++")
def test_the_table_made_in_cpp() -> None:
    """It is the one that Python makes; and there is none of what only Python has a way for."""

    def tensors(p: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return p, torch.randn(p.shape).to(p.dtype), torch.zeros(p.shape), torch.zeros(p.shape)

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    shapes = ((3, 4), (), (0, 5), (7,), (1, 1, 2))
    call = list(zip(*[tensors(torch.randn(s).to(d)) for s in shapes for d in dtypes], strict=True))
    none = [None] * len(call[0])
    rows = adamw_native.Rows(*call, none, none).rows
    assert adamw_native.table_of(*call) == (array("q", itertools.chain.from_iterable(rows)).tobytes(), 0)

    p, grad, m, v = tensors(torch.randn(3, 4))
    for changed in (
        (p, torch.randn(4, 3).t(), m, v),
        (p, grad, torch.zeros(12), v),
        (p, grad, m, v.double()),
        (p.double(), grad, m, v),
        (p, grad.to_sparse(), m, v),
    ):
        assert adamw_native.table_of(*([t] for t in changed)) is None
    with fastlm.backend("reference"):
        assert adamw_native.table_of([p], [grad], [m], [v]) is None


@pytest.mark.skipif(not native.reads_tensors(), reason="this torch's tensors cannot be read in C++")
def test_steps_that_are_all_the_same() -> None:
    steps = [torch.tensor(2.0) for _ in range(3)]
    assert adamw_native.common_step(steps) == 2 and adamw_native.common_step(steps, add_one=True) == 2
    assert [s.item() for s in steps] == [3.0] * 3
    steps[1] += 1
    assert adamw_native.common_step(steps, add_one=True) is None and [s.item() for s in steps] == [3.0, 4.0, 3.0]
    assert adamw_native.common_step([]) is None and adamw_native.common_step([torch.zeros(2)]) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_the_norm_in_a_cuda_graph() -> None:
    """The table of addresses is copied again by every replay: it must still be there."""
    gradients = [torch.randn(n, device="cuda") for n in (5, 9000)]
    with fastlm.backend("cuda"):
        ops.grad_norm(gradients, 1.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            norm, _ = ops.grad_norm([g * 1 for g in gradients], 1.0)
    kept = [torch.full((n,), -1).pin_memory() for n in (2, 18, 32, 64, 512)]  # what it was copied from, were it freed
    for factor in (2.0, 3.0):
        for g in gradients:
            g.mul_(factor)
        graph.replay()
        torch.testing.assert_close(norm, torch.cat(gradients).norm())
    assert all((t == -1).all() for t in kept)


def test_a_tensor_as_grad_scale(backend: str) -> None:
    call = {"exp_avgs": [torch.zeros(9)], "exp_avg_sqs": [torch.zeros(9)], "step": 1, "lr": 0.1}
    grads, results = [torch.arange(9.0)], []
    for scale in (0.25, torch.tensor(0.25)):
        p = torch.ones(9)
        ops.adamw_(
            [p],
            grads,
            **{k: [t.clone() for t in v] if isinstance(v, list) else v for k, v in call.items()},
            eps=1.0,
            grad_scale=scale,
        )
        results.append(p)
    assert torch.equal(*results) and not torch.equal(results[0], torch.ones(9))
    with pytest.raises(ValueError, match=r"a tensor grad_scale must have one element .* got shape \(2,\)"):
        ops.adamw_([torch.ones(9)], grads, **call, grad_scale=torch.ones(2))


def test_the_norm_of_half_precision_gradients_does_not_overflow() -> None:
    p = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    p.grad = torch.full_like(p, 3e4)
    torch.testing.assert_close(fastlm.optim.clip_grad_norm([p], 1.0).norm.item(), 3e4 * 1000**0.5, rtol=1e-3, atol=0)


def test_a_gradient_that_is_not_finite_shows_in_the_scale() -> None:
    p = nn.Parameter(torch.zeros(3))
    for bad in (float("nan"), float("inf")):
        p.grad = torch.tensor([1.0, bad, 0.0])
        norm, scale = fastlm.optim.clip_grad_norm([p], 1.0)
        assert not norm.isfinite() and scale.isnan()


def test_clipping_without_gradients() -> None:
    assert fastlm.optim.clip_grad_norm([nn.Parameter(torch.zeros(3))], 1.0) == (0.0, 1.0)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_bad_max_norm_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm must be positive, got"):
        fastlm.optim.clip_grad_norm([nn.Parameter(torch.zeros(3))], max_norm)


def test_grad_scaler_of_torch_amp(backend: str) -> None:
    params = parameters()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AdamW(params)
    scaler.scale(torch.zeros(()))  # makes the scale
    for bad in (False, True):
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, gradients(params, 0), strict=True):
            p.grad = g * 1024.0 * (float("inf") if bad else 1.0)
        scaler.step(optimizer)
        scaler.update()
        moved = not all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        assert moved != bad
    wanted = parameters()
    train(AdamW(wanted), range(1))
    assert all(torch.equal(a, b) for a, b in zip(params, wanted, strict=True))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must not be negative, got -1\.0"),
        ({"lr": torch.zeros(2)}, r"a tensor lr must have one element, got shape \(2,\)"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), got \(0\.9,\)"),
        ({"eps": -1e-8}, "eps must not be negative, got -1e-08"),
        ({"weight_decay": -0.1}, r"weight_decay must not be negative, got -0\.1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(), **options)
    optimizer = AdamW(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(), **options})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float16 or float64, got torch\.complex64, shape \(2,\)"):
        AdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@pytest.mark.parametrize("named", [False, True])
def test_sparse_gradients_are_refused_by_name_before_anything_moves(named: bool) -> None:
    linear, embedding = nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True)
    model = nn.ModuleDict({"linear": linear, "embedding": embedding})
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamW(model.named_parameters() if named else model.parameters())
    name = "embedding.weight" if named else "parameter 2 of its group"
    with pytest.raises(ValueError, match=rf"gradient of {name}, shape \(5, 3\), is sparse"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="is sparse"):
        fastlm.optim.clip_grad_norm(model.parameters(), 1.0)


def call(**changes: Any) -> dict[str, Any]:
    lists = {name: [torch.ones(3, 4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    return {**lists, "step": 1, "lr": 0.1, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": []}, "grads must hold one tensor for each of the 1 params, got 0"),
        ({"masters": [None, None]}, "masters must hold one tensor for each of the 1 params, got 2"),
        ({"step": 0}, "step is counted from 1, got 0"),
        ({"grads": [torch.ones(4, 3)]}, r"grads\[0\] must have shape of params\[0\] = \(3, 4\), got \(4, 3\)"),
        ({"grads": [torch.ones(3, 4).int()]}, r"grads\[0\] must be float32, .* got torch\.int32"),
        ({"grads": [torch.ones(3, 4).to_sparse()]}, r"grads\[0\] is sparse"),
        ({"params": [torch.ones(3, 4).int()]}, r"params\[0\] must be float32, .* got torch\.int32"),
        ({"exp_avgs": [torch.ones(12)]}, r"exp_avgs\[0\] must have shape of its parameter = \(3, 4\), got \(12,\)"),
        (
            {"exp_avg_sqs": [torch.ones(3, 4).bfloat16()]},
            r"exp_avg_sqs\[0\] must be torch\.float32 beside a torch\.float32",
        ),
        ({"exp_avg_sqs": [torch.ones(4, 3).t()]}, r"exp_avg_sqs\[0\] must be contiguous, .* strides \(1, 3\)"),
        ({"exp_avgs": [torch.ones(3, 4, device="meta")]}, r"exp_avgs\[0\] is on meta, but its parameter is on cpu"),
        ({"grads": [torch.ones(3, 4, device="meta")]}, r"grads\[0\] is on meta, but params\[0\] is on cpu"),
    ],
)
def test_the_op_refuses_what_does_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.adamw_(**call(**changes))


def test_explain_and_the_table_know_adamw() -> None:
    explanation = ops.explain("adamw", **call())
    assert explanation.chosen in ("cpu", "reference") and set(explanation.reasons) == set(registry.NAMES)
    assert str(ops.explain(ops.adamw_, **call())) == str(explanation)
    double = {k: [t.double() for t in v] if isinstance(v, list) else v for k, v in call().items()}
    assert ops.explain("adamw", **double).chosen == "reference"
    assert registry.table()["adamw"]["reference"] is None
