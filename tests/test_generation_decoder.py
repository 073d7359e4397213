"""The decoder in C++ gives what the model's layers give, one after the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastlm
from fastlm.generation.cache import KVCache, RaggedCache
from fastlm.generation.decoder import Decoder
from fastlm.ops import native

pytestmark = pytest.mark.skipif(native.C is None, reason="fastlm._C is not built")

SMALL: dict[str, Any] = {"vocab_size": 97, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "no-bias": {"bias": False},
    "llama": {"norm": "rms_norm", "position": "rotary", "activation": "swiglu", "bias": False, "n_kv_head": 2},
    "alibi": {"position": "alibi", "activation": "gelu"},
    "sinusoidal": {"position": "sinusoidal", "activation": "relu2"},
    "window": {"sliding_window": 5, "n_kv_head": 1},
    "softcaps": {"attention_softcap": 2.0, "logit_softcap": 3.0, "attention_scale": 0.3},
    "untied": {"tie_embeddings": False, "activation": "geglu"},
    "qk-norm": {"qk_norm": True, "norm": "rms_norm", "position": "rotary", "bias": False, "n_kv_head": 2},
    "qk-norm-learned": {"qk_norm": True, "head_dim": 10},
    "one-layer": {"n_layer": 1, "head_dim": 10},
}


def model_of(dtype: torch.dtype = torch.float32, **fields: Any) -> fastlm.GPT:
    torch.manual_seed(0)
    model = fastlm.GPT(fastlm.GPTConfig(**{**SMALL, **fields}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # also in the biases, so that a forgotten one shows
    return model.to(dtype).eval()


def filled(model: fastlm.GPT, rows: int, length: int, capacity: int = 64) -> KVCache:
    cache = KVCache(model.config.n_layer, capacity)
    torch.manual_seed(length)
    with torch.no_grad():
        model.hidden_states(torch.randint(97, (rows, length)), cache=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_hidden_states_and_cache_are_those_of_the_layers(fields: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(dtype, **fields)
    assert Decoder.suits(model)
    decode = Decoder(model)
    ours, layers = filled(model, 3, 7, capacity=8), filled(model, 3, 7, capacity=8)  # the second token makes them grow
    for step in range(3):
        last = torch.randint(97, (3, 1), generator=torch.Generator().manual_seed(step))
        got, wanted = decode(last, ours), model.hidden_states(last, cache=layers)
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert ours.length == layers.length == 10


@torch.no_grad()
@pytest.mark.parametrize("fields", [CONFIGS["gpt2"], CONFIGS["llama"]], ids=["gpt2", "llama"])
def test_rows_of_different_lengths_are_what_each_is_alone(fields: dict[str, Any]) -> None:
    model = model_of(**fields)
    decode = Decoder(model)
    last = torch.tensor([[5], [6], [7]])
    together = decode(last, RaggedCache([filled(model, 2, 4), filled(model, 1, 19)], [2, 1]))
    apart = [decode(last[:2], filled(model, 2, 4)), decode(last[2:], filled(model, 1, 19))]
    assert torch.equal(together, torch.cat(apart))


@torch.no_grad()
def test_the_number_of_threads_changes_nothing() -> None:
    model, threads = model_of(), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(Decoder(model)(torch.tensor([[3]]), filled(model, 1, 30)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_models_that_it_does_not_know_are_left_to_their_layers() -> None:
    hooked, mixed, foreign = model_of(), model_of(), model_of()
    calls: list[int] = []
    hooked.blocks[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    mixed.norm.double()
    foreign.blocks[0].mlp = torch.nn.Sequential(copy.deepcopy(foreign.blocks[0].mlp))
    assert not any(map(Decoder.suits, (hooked, mixed, foreign)))
    hooked.generate(torch.tensor([[1, 2]]), 3, temperature=0.0)
    assert len(calls) == 3
    with fastlm.backend("reference"):
        assert not Decoder.suits(model_of())
    with torch.autocast("cpu", torch.bfloat16):
        assert not Decoder.suits(model_of())


def test_more_rows_than_the_kernel_takes() -> None:
    model = model_of()
    prompts = torch.randint(97, (20, 3))
    many = model.generate(prompts, 4, temperature=0.0)
    few = torch.cat([model.generate(part, 4, temperature=0.0) for part in prompts.split(5)])
    assert torch.equal(many, few)
