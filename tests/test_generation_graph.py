"""A step of decoding that reads the rows' lengths from the device gives what the model's layers give.

What of it is a CUDA graph runs on a GPU only; without one a replay is the step itself, called again.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastlm
from fastlm.generation import graph
from fastlm.generation.cache import KVCache, Pool, PoolRows, RaggedCache
from fastlm.generation.fused import FusedStep
from fastlm.generation.graph import GraphDecoder
from fastlm.ops import graphs, native
from tests.emulator import backend as emulator

generation = importlib.import_module("fastlm.generation.generate")  # the package has a function of this name

SMALL: dict[str, Any] = {"vocab_size": 97, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rms_norm", "position": "rotary", "activation": "swiglu", "bias": False, "n_kv_head": 2},
    "alibi": {"position": "alibi", "sliding_window": 9},
    "qk-norm": {"qk_norm": True, "position": "rotary"},
    "sinusoidal": {"position": "sinusoidal", "attention_softcap": 2.0, "logit_softcap": 3.0},
}


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":

        def record(step: Callable[[], None], device: torch.device) -> tuple[Any, None]:
            return SimpleNamespace(replay=step), None

        monkeypatch.setattr(graphs, "record", record)
    elif not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    return request.param


def model_of(device: str, **fields: Any) -> fastlm.GPT:
    torch.manual_seed(0)
    return fastlm.GPT(fastlm.GPTConfig(**{**SMALL, **fields})).to(device).eval()


def filled(model: fastlm.GPT, rows: int, length: int, capacity: int = 64, pool: PoolRows | None = None) -> KVCache:
    cache = KVCache(model.config.n_layer, capacity, pool)
    ids = torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        model.hidden_states(ids.to(model.device), cache=cache)
    return cache


def token(model: fastlm.GPT, rows: int, step: int) -> torch.Tensor:
    return torch.randint(97, (rows, 1), generator=torch.Generator().manual_seed(step)).to(model.device)


def layers_logits(model: fastlm.GPT, last: torch.Tensor, cache: Any) -> torch.Tensor:
    return model.logits(model.hidden_states(last, cache=cache)[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_the_layers(device: str, fields: dict[str, Any]) -> None:
    model = model_of(device, **fields)
    decode = GraphDecoder(model)
    ours, layers = filled(model, 3, 7, capacity=11), filled(model, 3, 7, capacity=11)  # they grow on the way
    for step in range(9):
        last = token(model, 3, step)
        torch.testing.assert_close(decode(last, ours), layers_logits(model, last, layers))
    assert ours.length == layers.length == 16


@pytest.fixture(params=["emulator", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of tensors that CUDA kernels take: the emulator's are on the CPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    reason = emulator.unavailable() if request.param == "emulator" else native.cuda_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with fastlm.backend(request.param), emulator.emulated() if request.param == "emulator" else nullcontext():
        yield "cpu" if request.param == "emulator" else "cuda"


class Quantised(nn.Parameter):
    """A parameter of another class: its numbers may lie elsewhere."""


FUSED = {
    **CONFIGS,
    "gelu": {"activation": "gelu", "bias": False, "intermediate_size": 88},
    "geglu": {"activation": "geglu", "norm": "rms_norm", "n_embd": 264, "n_head": 3},
    "relu2": {"activation": "relu2", "intermediate_size": 3328, "n_layer": 1},  # more columns than are read at once
}
LARGE = {
    "48 KB": {"activation": "relu", "intermediate_size": 12288, "n_layer": 1},  # in float32, and static arrays
    "vocabulary": {"vocab_size": 8193, "n_layer": 1},  # two outputs a warp
}
CASES = [(fields, dtype) for fields in FUSED.values() for dtype in (torch.float32, torch.bfloat16, torch.float16)]
CASES += [(fields, torch.float32) for fields in LARGE.values()]


@torch.no_grad()
@pytest.mark.parametrize(("fields", "dtype"), CASES, ids=str)
def test_few_kernels_give_what_the_layers_give(gpu: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(gpu, **fields).to(dtype)
    for p in model.parameters():  # biases and norms that do something
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p) * 0.1)
    assert FusedStep.suits(model)
    few = FusedStep(model)
    ids = torch.randint(97, (1, 7), generator=torch.Generator().manual_seed(1)).to(gpu)
    caches = [KVCache(model.config.n_layer, 64) for _ in range(2)]
    for cache in caches:
        model.hidden_states(ids, cache=cache)
    last = token(model, 1, 0)
    lengths = torch.full((1,), 7, device=gpu)
    wanted = model.hidden_states(last, cache=caches[0])
    got = few(last, graph._DeviceCache(graph._Stores(*caches[1].stores()), lengths))
    wide = model_of(gpu, **fields)
    wide.load_state_dict(model.state_dict())
    with fastlm.backend("reference"):
        exact = wide.hidden_states(torch.cat((ids, last), 1))[:, -1:]
    torch.testing.assert_close(few.logits(got), model.logits(got))
    error, allowed = ((t.float() - exact).abs().max().item() for t in (got, wanted))
    floor = 8 * torch.finfo(dtype).eps * exact.abs().max().item()
    assert error <= 2 * allowed + floor, f"error {error:.3g}, the layers' {allowed:.3g}"


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_one_sequence_is_decoded_by_few_kernels(gpu: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its cache grows, too; two are not."""
    if gpu == "cpu":
        monkeypatch.setattr(graphs, "record", lambda step, device: (SimpleNamespace(replay=step), None))
    steps = []
    run = FusedStep.__call__
    monkeypatch.setattr(FusedStep, "__call__", lambda self, *a: steps.append(a) or run(self, *a))
    model = model_of(gpu, n_layer=1)
    decode = GraphDecoder(model)
    ours, layers = filled(model, rows, 7, capacity=9), filled(model, rows, 7, capacity=9)
    for step in range(4):
        last = token(model, rows, step)
        torch.testing.assert_close(decode(last, ours), layers_logits(model, last, layers))
    assert bool(steps) == (rows == 1)


def test_whom_few_kernels_suit(gpu: str) -> None:
    model = model_of(gpu)
    assert FusedStep.suits(model)
    assert not FusedStep.suits(model_of(gpu, n_embd=60))  # rows that are not whole pieces of 16 bytes
    assert not FusedStep.suits(model_of(gpu, intermediate_size=32768))  # more shared memory than a block is to have
    assert not FusedStep.suits(model_of(gpu).double())
    with fastlm.backend("reference"):
        assert not FusedStep.suits(model)
    model.norm.double()
    assert not FusedStep.suits(model)
    model = model_of(gpu)
    model.blocks[0].attention.qkv.weight = nn.Parameter(torch.empty(192, 64, device="meta"))
    assert not FusedStep.suits(model)
    model.blocks[0].attention.qkv.weight = Quantised(torch.ones(192, 64, device=gpu))
    assert not FusedStep.suits(model)


@torch.no_grad()
def test_rows_of_different_lengths_in_one_pool(device: str) -> None:
    model = model_of(device)
    pool = Pool(3, 32)
    caches = [filled(model, 2, 4, pool=PoolRows(pool, 0, 2)), filled(model, 1, 19, pool=PoolRows(pool, 2, 1))]
    alone = [filled(model, 2, 4), filled(model, 1, 19)]
    decode = GraphDecoder(model)
    for step in range(4):
        last = token(model, 3, step)
        got = decode(last, RaggedCache(caches, [2, 1]))
        wanted = [layers_logits(model, last[:2], alone[0]), layers_logits(model, last[2:], alone[1])]
        torch.testing.assert_close(got, torch.cat(wanted))


@torch.no_grad()
def test_a_cache_that_was_emptied_or_cut_goes_on(device: str) -> None:
    model = model_of(device)
    decode, cache = GraphDecoder(model), filled(model, 3, 7)
    for step in range(3):
        decode(token(model, 3, step), cache)
    cache.cut(0)
    model.hidden_states(token(model, 3, 9), cache=cache)
    cache.keep(torch.tensor([0, 2], device=model.device))
    other = KVCache(model.config.n_layer)
    model.hidden_states(token(model, 3, 9)[[0, 2]], cache=other)
    for step in range(3):
        last = token(model, 2, step)
        torch.testing.assert_close(decode(last, cache), layers_logits(model, last, other))


@torch.no_grad()
def test_where_nothing_can_be_recorded_steps_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("cpu")

    def record(step: Callable[[], None], device: torch.device) -> Any:
        raise RuntimeError("it waits")

    monkeypatch.setattr(graphs, "record", record)
    decode, cache, layers = GraphDecoder(model), filled(model, 2, 7), filled(model, 2, 7)
    for step in range(4):
        last = token(model, 2, step)
        with pytest.warns(UserWarning, match="it waits") if step == 1 else nullcontext():
            got = decode(last, cache)
        torch.testing.assert_close(got, layers_logits(model, last, layers))


def test_generation_is_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several lengths, of which one stops early and one comes to the end of the context."""
    model = model_of(device)
    prompts = [[1, 2, 3], [4, 5, 6], [7] * 60, [8, 9]]
    options: dict[str, Any] = {"temperature": 0.0, "stop": lambda ids: len(ids) == 5 and ids[0] % 2 == 0}
    monkeypatch.setattr(generation, "_decoder", lambda model: functools.partial(layers_logits, model))
    wanted = model.generate(prompts, 12, **options)
    made: list[GraphDecoder] = []

    def decoder(model: fastlm.GPT) -> GraphDecoder:
        made.append(GraphDecoder(model))
        return made[0]

    monkeypatch.setattr(generation, "_decoder", decoder)
    got = model.generate(prompts, 12, **options)
    assert made and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_whom_it_suits() -> None:
    model = model_of("cpu")
    assert not GraphDecoder.suits(model)
    if torch.cuda.is_available():
        assert GraphDecoder.suits(model.cuda())
        with torch.autocast("cuda", torch.bfloat16):
            assert not GraphDecoder.suits(model)
        model.norm.register_forward_hook(lambda *_: None)
        assert not GraphDecoder.suits(model)
