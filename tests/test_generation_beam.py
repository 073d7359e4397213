"""Beam search against the exhaustive one, the length penalty, batches, bad input."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

import fastlm
from fastlm.generation import beam_search
from fastlm.generation.beam import Hypothesis

VOCAB, EOS = 6, 5


@pytest.fixture(scope="module")
def model() -> fastlm.GPT:
    torch.manual_seed(0)
    config = fastlm.GPTConfig(vocab_size=VOCAB, block_size=12, n_layer=2, n_head=2, n_embd=16, init_std=0.6)
    return fastlm.GPT(config).eval()


def likely_end(model: fastlm.GPT, by: float) -> fastlm.GPT:
    """A copy whose end token is among the likeliest, where a hypothesis may end: its logit is larger by so much."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        end = model.wte.weight[EOS]
        model.norm.bias += by * end / end.dot(end)
    return model


def log_p(model: fastlm.GPT, prompt: list[int], continuation: list[int]) -> float:
    logits, _ = model(torch.tensor([prompt + continuation]))
    table = torch.log_softmax(logits[0].double(), -1)
    return sum(table[len(prompt) - 1 + i, t].item() for i, t in enumerate(continuation))


def exhaustive(model: fastlm.GPT, prompt: list[int], longest: int, penalty: float) -> Hypothesis:
    """The best of all continuations that end within `longest` tokens."""
    candidates = [
        Hypothesis(list(body), log_p(model, prompt, [*body, EOS]) / (n + 1) ** penalty)
        for n in range(longest)
        for body in itertools.product(range(EOS), repeat=n)
    ]
    return max(candidates, key=lambda h: h.score)


@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_nearly_equal_chances_are_searched_as_by_trying_all(penalty: float) -> None:
    torch.manual_seed(3)
    config = fastlm.GPTConfig(vocab_size=VOCAB, block_size=12, n_layer=1, n_head=2, n_embd=16, init_std=0.1)
    model = likely_end(fastlm.GPT(config).eval(), by=1.0)
    found = [beam_search(model, [[t]], 2, eos_token=EOS, beams=3, length_penalty=penalty)[0] for t in range(5)]
    best = [exhaustive(model, [t], 2, penalty) for t in range(5)]
    assert all(f.score <= b.score + 1e-4 for f, b in zip(found, best, strict=True))
    assert [f.tokens for f in found] == [b.tokens for b in best]


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_it_is_the_textbooks_search(model: fastlm.GPT, beams: int) -> None:
    """Without a cache and without batches: every hypothesis from its beginning, every time."""

    def textbook(prompt: list[int], longest: int) -> tuple[list[int], float]:
        going, finished = [([], 0.0)], []
        for step in range(1, longest + 1):
            extended = sorted((log_p(model, prompt, [*h, t]), [*h, t]) for h, _ in going for t in range(VOCAB))[::-1]
            first = extended[: 2 * beams]
            finished += [(h[:-1], score / step) for score, h in first[:beams] if h[-1] == EOS]
            finished = sorted(finished, key=lambda f: -f[1])[:beams]
            going = [(h, score) for score, h in first if h[-1] != EOS][:beams]
            if len(finished) == beams and finished[-1][1] >= going[0][1] / step:
                break
        return finished[0] if finished else (going[0][0], going[0][1] / longest)

    for prompt in ([0], [1], [2, 3], [4, 0, 1]):
        (found,) = beam_search(model, [prompt], 6, eos_token=EOS, beams=beams)
        tokens, score = textbook(prompt, 6)
        assert found.tokens == tokens
        assert found.score == pytest.approx(score, abs=1e-4)


def test_a_score_is_the_models_probability(model: fastlm.GPT) -> None:
    for prompt in ([0], [3, 1]):
        (found,) = beam_search(model, [prompt], 6, eos_token=EOS, beams=2, length_penalty=0.5)
        whole = [*found.tokens, EOS] if len(found.tokens) < 6 else found.tokens
        assert found.score == pytest.approx(log_p(model, prompt, whole) / math.sqrt(len(whole)), abs=1e-4)


def sharp(seed: int, **changes) -> fastlm.GPT:
    """A model of few tokens that is sure of them, as trained ones are."""
    torch.manual_seed(seed)
    options = {"vocab_size": 12, "block_size": 40, "n_layer": 1, "n_head": 2, "n_embd": 16, "init_std": 0.2, **changes}
    return fastlm.GPT(fastlm.GPTConfig(**options)).eval()


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_one_beam_is_greedy(penalty: float) -> None:
    """Whatever the end token's chance is: it ends a continuation only where it is the likeliest."""
    lengths = set()
    for seed in range(40):
        model = sharp(seed)
        prompt = torch.randint(0, 12, (4,)).tolist()
        greedy = model.generate([prompt], 20, temperature=0, eos_token=EOS)[0].tolist()[len(prompt) :]
        (found,) = beam_search(model, [prompt], 20, eos_token=EOS, beams=1, length_penalty=penalty)
        assert found.tokens == [t for t in greedy if t != EOS]
        lengths.add(len(found.tokens))
    assert len(lengths) > 3 and 20 in lengths  # some end soon, some late, some not at all


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_several_beams_are_those_of_transformers(penalty: float, tmp_path) -> None:
    """Where both end: of hypotheses that do not end in time, transformers ranks the unfinished ones too."""
    transformers = pytest.importorskip("transformers")
    model = likely_end(sharp(0, init_std=0.5), by=2 * penalty)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = torch.randint(0, 12, (16, 4))
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(prompts), "num_beams": 3, "length_penalty": penalty}
    expected = theirs.generate(prompts, **options)[:, 4:].tolist()
    found = beam_search(model, prompts.tolist(), 16, eos_token=EOS, beams=3, length_penalty=penalty)
    ended = [(f.tokens, e[: e.index(EOS)]) for f, e in zip(found, expected, strict=True) if EOS in e]
    assert len(ended) > 5 and len({len(tokens) for tokens, _ in ended}) > 2
    assert all(ours == theirs for ours, theirs in ended)


def test_a_batch_is_each_prompt_alone(model: fastlm.GPT) -> None:
    prompts = [[0], [1, 2], [3], [4, 4], [2, 1, 0], [1]]
    together = beam_search(model, prompts, 7, eos_token=EOS, beams=3)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = beam_search(model, [prompt], 7, eos_token=EOS, beams=3)
        assert found.tokens == alone.tokens
        assert found.score == pytest.approx(alone.score, abs=1e-4)
    assert beam_search(model, [], 3, eos_token=EOS, beams=2) == []


def test_a_larger_penalty_gives_longer_continuations(model: fastlm.GPT) -> None:
    prompts = [[t, u] for t in range(5) for u in range(5)]
    model = likely_end(model, by=2.0)
    lengths = [
        sum(len(h.tokens) for h in beam_search(model, prompts, 9, eos_token=EOS, beams=3, length_penalty=a))
        for a in (0.0, 1.0, 3.0)
    ]
    assert lengths[0] < lengths[1] <= lengths[2]


def test_the_context_is_the_limit(model: fastlm.GPT) -> None:
    (found,) = beam_search(model, [[0] * 10], 50, eos_token=EOS, beams=3)
    assert len(found.tokens) <= 2


def test_bad_input(model: fastlm.GPT) -> None:
    for prompts, options, message in (
        ([[]], {}, "prompt 0 has 0 tokens"),
        ([[0], [0] * 12], {}, "prompt 1 has 12 tokens; .*fewer than block_size = 12"),
        ([[0]], {"beams": 0}, r"beams must be from 1 to half of the vocabulary \(3\), got 0"),
        ([[0]], {"beams": 4}, "got 4"),
        ([[0]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            beam_search(model, prompts, **{"max_new_tokens": 3, "eos_token": EOS, "beams": 2, **options})
