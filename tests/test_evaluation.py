"""Scores of texts and of multiple-choice questions."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor, nn

from fastlm.data import BPETokenizer, ByteTokenizer, CharTokenizer, TokenData, write_dataset
from fastlm.evaluation import (
    Question,
    bootstrap_interval,
    gzip_bits_per_byte,
    read_questions,
    score_choices,
    score_split,
    score_text,
    score_tokens,
)
from fastlm.evaluation.text import _windows
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.nn.modes import evaluating
from tests.training_runs import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16, init_std=0.3))


class Counter(nn.Module):
    """A stand-in that knows nothing (uniform over V) and notes which targets it was asked for."""

    def __init__(self, vocab_size: int, block_size: int):
        super().__init__()
        self.config = GPTConfig(vocab_size=vocab_size, block_size=block_size, n_layer=1, n_head=1, n_embd=2)
        self.device = torch.device("cpu")
        self.asked: list[int] = []

    def forward(self, x: Tensor, y: Tensor, *, reduction: str) -> tuple[None, Tensor]:
        assert x.shape == y.shape and x.shape[1] <= self.config.block_size
        scored = y != -100
        self.asked += y[scored].tolist()
        return None, scored.sum() * math.log(self.config.vocab_size)


@pytest.mark.parametrize("length", [2, 3, 15, 16, 17, 18, 31, 32, 33, 100])
@pytest.mark.parametrize("stride", [1, 5, 8, 16, None])
@pytest.mark.parametrize("first", [None, 200])
def test_every_token_is_scored_exactly_once(length: int, stride: int | None, first: int | None) -> None:
    counter = Counter(201, 16)
    total, count = score_tokens(counter, np.arange(length), first=first, stride=stride, batch_size=3)  # type: ignore[arg-type]
    assert counter.asked == list(range(0 if first else 1, length))
    assert count == len(counter.asked)
    assert total == pytest.approx(count * math.log(201))


def test_windows_give_the_promised_context() -> None:
    windows = list(_windows(100, 16, 4))
    assert windows[0] == (0, 16, 1)
    for begin, end, first_target in windows[1:]:
        assert end - begin == 16
        assert first_target - begin >= 16 - 4 + 1  # inputs before the first new target


def test_a_score_is_the_models_probability(model: GPT) -> None:
    text = "hello, wörld!"  # one window
    ids = [256, *text.encode()]
    with torch.no_grad():
        logits, _ = model.eval()(torch.tensor([ids[:-1]]))
    expected = -torch.log_softmax(logits[0].double(), -1)[range(len(ids) - 1), ids[1:]].sum().item()
    score = score_text(model, ByteTokenizer(), text)
    assert score.tokens == score.text_bytes == len(ids) - 1
    assert score.loss * score.tokens == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / score.text_bytes, rel=1e-5)
    assert score.gzip_bits_per_byte == pytest.approx(8 * len(gzip.compress(text.encode(), 9)) / score.text_bytes)


def test_without_an_end_of_text_the_first_token_counts_nowhere() -> None:
    letters = tokenizers.models.BPE(vocab={chr(c): c - 97 for c in range(97, 123)}, merges=[])
    tokenizer = BPETokenizer(tokenizers.Tokenizer(letters))
    counter = Counter(26, 16)
    score = score_text(counter, tokenizer, "abc")  # type: ignore[arg-type]
    assert (score.tokens, score.text_bytes) == (2, 2)
    assert score.bits_per_byte == pytest.approx(math.log2(26))
    with pytest.raises(ValueError, match=r"a question has an empty context, and .* has no token that begins a text"):
        score_choices(counter, tokenizer, [Question("", ("ab", "cd"), 0)])  # type: ignore[arg-type]


def test_a_smaller_stride_gives_more_context_and_batches_change_nothing(model: GPT) -> None:
    ids = np.frombuffer(b"abcabc" * 20, dtype=np.uint8)
    sums = [score_tokens(model, ids, first=256, stride=s, batch_size=b)[0] for s, b in ((8, 1), (8, 7), (16, 7))]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert sums[2] != pytest.approx(sums[0], rel=1e-5)
    model.train()
    score_tokens(model, ids)
    assert model.training


def test_a_split_is_its_documents_with_their_ends(model: GPT, tmp_path: Path) -> None:
    texts = ["first document", "second", "third, ü"]
    write_dataset(iter([("val", t, True) for t in texts]), tmp_path / "d", ByteTokenizer(), shard_tokens=10)
    score = score_split(model, ByteTokenizer(), TokenData.open(tmp_path / "d", "val"))
    raw = "".join(texts).encode()
    assert score.tokens == len(raw) + 3
    assert score.text_bytes == len(raw)
    assert score.gzip_bits_per_byte == pytest.approx(gzip_bits_per_byte(raw))


def test_texts_that_cannot_be_scored(model: GPT) -> None:
    with pytest.raises(ValueError, match="the text is empty"):
        score_text(model, ByteTokenizer(), "")
    with pytest.raises(ValueError, match="nothing to score: 1 token"):
        score_tokens(model, np.array([3]))
    for stride in (0, 17):
        with pytest.raises(ValueError, match=rf"stride must be between 1 and block_size=16.*got {stride}"):
            score_tokens(model, np.arange(50), stride=stride)


QUESTIONS = [
    Question("a long context that the model reads", ("one", "another ending", "x"), 1),
    Question("short", ("yes", "no"), 0),
    Question("b", ("c", "d", "e", "f"), 3),
]


def test_choices_are_scored_as_one_by_one(model: GPT) -> None:
    tokenizer = ByteTokenizer()
    right, right_norm = [], []
    for question in QUESTIONS:
        sums = []
        for ending in question.endings:
            ids = ([256, *question.context.encode(), *f" {ending}".encode()])[-17:]
            with torch.no_grad():
                logits, _ = model.eval()(torch.tensor([ids[:-1]]))
            each = torch.log_softmax(logits[0], -1)[range(len(ids) - 1), ids[1:]]
            sums.append(each[-(len(ending) + 1) :].sum().item())
        right.append(int(np.argmax(sums)) == question.label)
        right_norm.append(
            int(np.argmax([s / len(e) for s, e in zip(sums, question.endings, strict=True)])) == question.label
        )
    for batch_size in (1, 4, 100):
        score = score_choices(model, tokenizer, QUESTIONS, batch_size=batch_size)
        assert (score.acc, score.acc_norm) == (np.mean(right), np.mean(right_norm))
        assert (score.questions, score.shortened) == (3, 3)


def test_a_model_that_knows_the_text_answers_right() -> None:
    """Trained on the right endings only, it finds them."""
    torch.manual_seed(0)
    texts = ["the sky is blue", "the grass is green", "the snow is white"]
    tokenizer = CharTokenizer.train(texts)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=20, n_layer=1, n_head=2, n_embd=32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = [[tokenizer.eot, *tokenizer.encode(t)] for t in texts]
    for _ in range(60):
        optimizer.zero_grad()
        for row in rows:
            model(torch.tensor([row[:-1]]), torch.tensor([row[1:]]))[1].backward()
        optimizer.step()
    colours = ("blue", "green", "white")
    questions = [Question(f"the {thing} is", colours, i) for i, thing in enumerate(("sky", "grass", "snow"))]
    score = score_choices(model, tokenizer, questions)
    assert score.acc == score.acc_norm == 1.0
    assert score.acc_interval == (1.0, 1.0)


def test_an_ending_that_does_not_fit_is_refused(model: GPT, tmp_path: Path) -> None:
    rows = [{"ctx": "c", "endings": ["x" * length, "y"], "label": 0} for length in (1, 30)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = r"q\.jsonl:2 has an ending of 31 tokens, which does not fit block_size=16: .*; take the question out"
    with pytest.raises(ValueError, match=message):
        score_choices(model, ByteTokenizer(), read_questions(tmp_path / "q.jsonl"))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_also_after_an_error(model: GPT, training: bool) -> None:
    model.train(training)
    for ids in (np.arange(5), np.array([300, 0])):  # the model does not know 300
        with contextlib.suppress(ValueError):
            score_tokens(model, ids)
        assert model.training == training and all(module.training == training for module in model.modules())
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert model.training == training


def test_the_bootstrap_interval() -> None:
    values = [1.0] * 30 + [0.0] * 70
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == (low, high)
    exact = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert low == pytest.approx(0.3 - exact, abs=0.025)
    assert high == pytest.approx(0.3 + exact, abs=0.025)


def test_questions_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    good = {"ctx": "c", "endings": ["a", "b"], "label": "1", "ind": 3}
    path.write_text(json.dumps(good) + "\n\n" + json.dumps({**good, "label": 0}))
    assert [q.label for q in read_questions(path)] == [1, 0]
    path.write_text("\ufeff" + json.dumps(good), encoding="utf-8")  # a byte order mark
    assert [q.label for q in read_questions(path)] == [1]
    for bad, message in (
        ({"ctx": "c"}, "there is no 'endings'; wanted {\"ctx\""),
        ({**good, "label": 2}, "label 2 is not the index of an ending"),
        ({**good, "endings": ["a"]}, "wanted two endings or more"),
        ({**good, "ctx": 3}, "ctx or an ending is not a string"),
        ([1], "list indices must be integers"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad))
        with pytest.raises(ValueError, match=rf"q\.jsonl:2: {message}"):
            read_questions(path)
    path.write_bytes(b'{"ctx": "\xff"}')
    with pytest.raises(ValueError, match=r"q\.jsonl:1: 'utf-8' codec can't decode"):
        read_questions(path)
    path.write_text("")
    with pytest.raises(ValueError, match="has no questions"):
        read_questions(path)


def test_hellaswags_file_has_this_form(data: Path) -> None:
    questions = read_questions(data / "eval" / "hellaswag_val_1k.jsonl")
    assert len(questions) == 1000
    assert {len(q.endings) for q in questions} == {4}
