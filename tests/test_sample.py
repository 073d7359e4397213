"""sample: every backend against the reference's kept set and exact sums, the draws against their probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastlm
from fastlm.ops import sample
from fastlm.ops.philox import philox4x32
from fastlm.ops.sample.reference import kept_weights, random_words
from tests.op_suite import BACKENDS, DTYPES, device_of
from tests.sampling_filters import filtered

SLOW = ("emulator", "triton")
OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)


def random_logits(rows: int, size: int, seed: int = 0, dtype=torch.float32, ties: bool = False) -> Tensor:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3
    return (x.round() if ties else x).to(dtype)


def states(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**62, (rows, 2), generator=torch.Generator().manual_seed(seed))


def run(backend: str, logits: Tensor, **arguments) -> Tensor:
    device = device_of(backend)
    moved = {name: a.to(device) if isinstance(a, Tensor) else a for name, a in arguments.items()}
    with fastlm.backend(backend):
        try:
            return sample(logits.to(device), **moved).cpu()
        except fastlm.UnsupportedError as reason:
            pytest.skip(str(reason))


def check(ids: Tensor, logits: Tensor, state: Tensor, options: dict) -> None:
    """Each id is where the running sum of exact probabilities passes the row's random number, to float32's rounding."""
    _, temperature, top_k, top_p, log_min_p, _ = fastlm.ops.registry._prepare["sample"](logits, **options)
    x = logits.float() / temperature
    weights = kept_weights(x, x.amax(-1, keepdim=True), top_k, top_p, log_min_p).double()
    low, high = random_words(state, len(x))
    target = (high.double() * 2**32 + low.double()) / 2.0**64
    after = (weights.cumsum(-1) / weights.sum(-1, keepdim=True)).gather(-1, ids[:, None])[:, 0]
    before = after - (weights / weights.sum(-1, keepdim=True)).gather(-1, ids[:, None])[:, 0]
    tolerance = 1e-6
    assert bool((weights.gather(-1, ids[:, None]) > 0).all()), "a token that had been left out"
    assert bool(((before - tolerance <= target) & (target <= after + tolerance)).all())


@options
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_are_those_of_the_random_numbers(backend, dtype, ties, options) -> None:
    rows = 1 if backend in SLOW else 6
    if backend in SLOW and ties != (dtype == torch.float32):
        pytest.skip("the emulator and Triton's interpreter run half of these: they take their time")
    logits, state = random_logits(rows, 1100, dtype=dtype, ties=ties), states(rows)
    ids = run(backend, logits, rng_state=state, **options)
    assert ids.dtype == torch.int64 and ids.shape == (rows,)
    if options.get("temperature") == 0:
        assert torch.equal(ids, (logits == logits.amax(-1, keepdim=True)).int().argmax(-1))
    else:
        check(ids, logits, state, options)
    assert torch.equal(ids, run(backend, logits, rng_state=state, **options))


@pytest.mark.parametrize("options", [{"top_k": 700}, {"top_p": 0.5}, {"top_k": 15000, "top_p": 0.3}], ids=str)
@pytest.mark.parametrize("spread", [0.4, 0.0])
@pytest.mark.parametrize("backend", ["cuda", "emulator"])
def test_more_candidates_than_shared_memory_holds(backend: str, spread: float, options: dict) -> None:
    """20,000 logits so near to each other that they do not fit at first, and equal ones, which never do."""
    logits = 1 + spread * torch.rand(1, 20000, generator=torch.Generator().manual_seed(0))
    state = states(1)
    check(run(backend, logits, rng_state=state, **options), logits, state, options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_frequencies_are_the_filtered_probabilities(backend, options) -> None:
    """100,000 draws: within five standard deviations of what the filters leave; nothing outside of the set."""
    draws, logits = 100_000, random_logits(1, 30, seed=3)
    probabilities = filtered(logits, **options).double().softmax(-1)[0]
    ids = run(backend, logits.expand(draws, 30), rng_state=torch.tensor([7, 1]), **options)
    frequencies = torch.bincount(ids, minlength=30).double() / draws
    deviation = (probabilities * (1 - probabilities) / draws).sqrt()
    assert bool(((frequencies - probabilities).abs() <= 5 * deviation).all())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_what_is_kept_is_what_the_filters_keep(seed, options) -> None:
    logits = random_logits(5, 200, seed)
    _, temperature, top_k, top_p, log_min_p, _ = fastlm.ops.registry._prepare["sample"](logits, **options)
    x = logits / temperature
    weights = kept_weights(x, x.amax(-1, keepdim=True), top_k, top_p, log_min_p)
    kept = (filtered(logits, **options) > -math.inf) & (x > x.amax(-1, keepdim=True) - 40 * math.log(2))
    assert torch.equal(weights > 0, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_choice(backend) -> None:
    logits = random_logits(6, 40)
    logits[0, 3] = math.nan
    logits[1, 5] = math.inf
    logits[2] = -math.inf
    logits[3] = -math.inf
    logits[3, 17] = -5.0
    logits[4, :39] = -math.inf
    state = states(6)
    for greedy in ({}, {"temperature": 0.0}):
        ids = run(backend, logits, rng_state=state, top_p=0.9, **greedy)
        assert ids[:5].tolist() == [-1, -1, -1, 17, 39] and 0 <= int(ids[5]) < 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_are_kept_at_the_kth_and_cut_in_order_by_top_p(backend) -> None:
    rows = 40 if backend in SLOW else 300
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, -3.0]]).expand(rows, 6)
    assert set(run(backend, logits, top_k=2, rng_state=states(rows)).tolist()) == {1, 2, 3, 4}
    # 1.0 has the probability 0.227: two of the four reach 0.4
    assert set(run(backend, logits, top_p=0.4, rng_state=states(rows)).tolist()) == {1, 2}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_its_own_state_does_not_depend_on_its_place(backend) -> None:
    logits, state = random_logits(5, 300), states(5)
    together = run(backend, logits, rng_state=state, top_k=30)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(run(backend, logits[order], rng_state=state[order], top_k=30), together[order])
    shared = run(backend, torch.zeros(1, 300).expand(20, 300), rng_state=state[0])
    assert len(set(shared.tolist())) > 5, "rows of one state draw different numbers"


def test_random_words_are_philox() -> None:
    low, high = random_words(torch.tensor([5 + (9 << 32), 77]), 3)
    words = philox4x32((torch.arange(3), 0, 0, 77), (5, 9))
    assert torch.equal(low, words[0]) and torch.equal(high, words[1])


def test_seeds_repeat() -> None:
    logits = random_logits(4, 500)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(sample(logits))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    own = [sample(logits, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(own[0], own[1]) and not torch.equal(own[0], own[2])


def test_any_number_of_threads_and_any_strides() -> None:
    logits, state, results = random_logits(40, 3000), states(40), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sample(logits, top_p=0.9, rng_state=state))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(sample(logits.T.contiguous().T, top_p=0.9, rng_state=state), results[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.randn(3)}, r"logits must have shape \(B, V\), V from 1 to 4194304, got \(3,\)"),
        ({"logits": torch.randn(3, 0)}, r"got \(3, 0\)"),
        ({"logits": torch.ones(3, 4, dtype=torch.int64)}, "logits must be float32, .* got torch.int64"),
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or positive, got -1.0"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, or None, got 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], or None, got 1.5"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], or None, got -0.1"),
        (
            {"rng_state": torch.zeros(3)},
            r"rng_state must be int64 of shape \(2\) or \(B, 2\) = \(2, 2\), got torch.float32",
        ),
    ],
)
def test_bad_input(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        sample(**{"logits": torch.randn(2, 8), **arguments})


def test_under_compile_and_opcheck() -> None:
    logits, state = random_logits(3, 50), states(3)
    torch._dynamo.reset()
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, top_k=5, rng_state=state), sample(logits, top_k=5, rng_state=state))
    call = (logits, 1.0, 5, 0.9, -2.0, state, "cpu")
    torch.library.opcheck(torch.ops.fastlm.sample.default, call, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 2),
    size=st.integers(1, 1500),
    temperature=st.floats(0.05, 5),
    top_k=st.one_of(st.none(), st.integers(1, 60)),
    top_p=st.one_of(st.none(), st.floats(1e-6, 1.0)),
    min_p=st.one_of(st.none(), st.floats(0.0, 1.0)),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_fuzz(backend, rows, size, temperature, top_k, top_p, min_p, ties, seed) -> None:
    logits, state = random_logits(rows, size, seed, ties=ties), states(rows, seed)
    arguments = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    ids = run(backend, logits, rng_state=state, **arguments)
    reference = run("reference", logits, rng_state=state, **arguments)
    if not torch.equal(ids, reference):  # a boundary in the last bit of the exponential
        check(ids, logits, state, arguments)
