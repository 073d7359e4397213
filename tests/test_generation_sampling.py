"""The filters against brute force, and the draws against the filtered probabilities."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastlm.generation import Sampling, penalise_repetition
from tests.sampling_filters import filter_min_p, filter_top_k, filter_top_p, filtered

SEEDS = range(5)


def random_logits(seed: int, rows: int = 4, size: int = 23) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [set(torch.nonzero(row > -math.inf)[:, 0].tolist()) for row in logits]


def by_probability(row: torch.Tensor) -> list[tuple[float, int]]:
    return sorted(((p, i) for i, p in enumerate(row.double().softmax(-1).tolist())), reverse=True)


@pytest.mark.parametrize("k", [1, 2, 7, 23, 99])
@pytest.mark.parametrize("seed", SEEDS)
def test_top_k(seed, k):
    logits = random_logits(seed)
    expected = [{i for _, i in by_probability(row)[:k]} for row in logits]
    assert kept(filter_top_k(logits, k)) == expected


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", SEEDS)
def test_top_p_is_the_smallest_set_that_reaches_p(seed, p):
    logits = random_logits(seed)
    expected = []
    for row in logits:
        chosen, total = set(), 0.0
        for probability, i in by_probability(row):
            if total >= p:
                break
            chosen.add(i)
            total += probability
        expected.append(chosen)
    assert kept(filter_top_p(logits, p)) == expected


@pytest.mark.parametrize("p", [1e-4, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_min_p(seed, p):
    logits = random_logits(seed)
    expected = []
    for row in logits:
        ranked = by_probability(row)
        expected.append({i for probability, i in ranked if probability >= p * ranked[0][0] * (1 - 1e-9)})
    assert kept(filter_min_p(logits, p)) == expected


def test_what_is_kept_is_unchanged():
    logits = random_logits(0)
    for left in (filter_top_k(logits, 5), filter_top_p(logits, 0.8), filter_min_p(logits, 0.1)):
        stays = left > -math.inf
        assert torch.equal(left[stays], logits[stays]) and not bool(stays.all())


def test_penalty_lowers_what_was_seen():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    seen = torch.tensor([[True, True, False, True]])
    torch.testing.assert_close(penalise_repetition(logits, seen, 2.0), torch.tensor([[1.0, -4.0, 1.0, 0.0]]))


def test_temperature_zero_is_the_argmax():
    logits = random_logits(1)
    assert torch.equal(Sampling(temperature=0.0, top_k=3)(logits), logits.argmax(-1))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=4),
        Sampling(top_p=0.7),
        Sampling(min_p=0.2),
        Sampling(temperature=1.5, top_k=6, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_probabilities(sampling):
    """200,000 draws: each frequency within five standard deviations, and nothing outside the kept set."""
    draws = 200_000
    logits = random_logits(2, rows=1, size=9)
    seen = torch.arange(9)[None] % 3 == 0
    options = dataclasses.asdict(sampling)
    penalty = options.pop("repetition_penalty")
    penalised = logits if penalty is None else penalise_repetition(logits, seen, penalty)
    probabilities = filtered(penalised, **options).double().softmax(-1)[0]
    tokens = sampling(logits.expand(draws, 9), seen.expand(draws, 9), torch.Generator().manual_seed(0))
    frequencies = torch.bincount(tokens, minlength=9).double() / draws
    deviation = (probabilities * (1 - probabilities) / draws).sqrt()
    assert bool(((frequencies - probabilities).abs() <= 5 * deviation).all())
    assert bool((frequencies[probabilities == 0] == 0).all())


def test_order_of_the_steps():
    """The temperature comes before top-p and min-p: a hot distribution keeps more tokens."""
    logits = random_logits(3)
    for name in ("top_p", "min_p"):
        cold, hot = (filtered(logits, temperature=t, **{name: 0.5}) for t in (0.3, 3.0))
        assert all(a <= b for a, b in zip(kept(cold), kept(hot), strict=True))
        assert kept(cold) != kept(hot)
