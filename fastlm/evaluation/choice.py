"""Multiple-choice tasks in HellaSwag's form: which ending does the model find the likeliest?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastlm.data import Tokenizer
from fastlm.evaluation.recurrent import CausalModel, context_of, loss_of
from fastlm.nn.modes import autocast, evaluating
from fastlm.ops.linear_cross_entropy import IGNORED

RESAMPLES = 2000  # of the bootstrap: the ends of a 95 % interval then wobble by about 0.001


@dataclass(frozen=True)
class Question:
    """A context, its possible endings, and which of them is right; `where` it was read, for messages."""

    context: str
    endings: tuple[str, ...]
    label: int
    where: str = "a question"


@dataclass(frozen=True)
class ChoiceScore:
    """Accuracy over a task.

    Attributes:
        acc: the ending with the highest log-likelihood is right.
        acc_norm: the one with the highest log-likelihood per byte is.
        acc_interval, acc_norm_interval: 95 % bootstrap intervals over the questions.
        questions: how many.
        shortened: endings whose context was cut on the left to fit the model.
    """

    acc: float
    acc_interval: tuple[float, float]
    acc_norm: float
    acc_norm_interval: tuple[float, float]
    questions: int
    shortened: int


def read_questions(path: str | Path) -> list[Question]:
    """Questions from a JSONL file: "ctx" (a string), "endings" (two strings or more), "label" (the index of the
    right one).

    Raises:
        ValueError: a line is not of that form; says which and why.
    """
    path = Path(path)
    questions = []
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row["endings"], list):
                    raise ValueError(f"endings must be a list, got {row['endings']!r}")
                question = Question(row["ctx"], tuple(row["endings"]), int(row["label"]), f"{path}:{number}")
                if not all(isinstance(text, str) for text in (question.context, *question.endings)):
                    raise ValueError("ctx or an ending is not a string")
                if len(question.endings) < 2 or not all(question.endings):
                    raise ValueError("wanted two endings or more, none of them empty")
                if not 0 <= question.label < len(question.endings):
                    raise ValueError(f"label {row['label']!r} is not the index of an ending")
            except (ValueError, KeyError, TypeError) as e:
                reason = f"there is no {e}" if isinstance(e, KeyError) else e
                raise ValueError(
                    f'{path}:{number}: {reason}; wanted {{"ctx": text, "endings": [text, text, …], "label": index}}'
                ) from None
            questions.append(question)
    if not questions:
        raise ValueError(f"{path} has no questions")
    return questions


def score_choices(
    model: CausalModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    precision: str = "fp32",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ChoiceScore:
    """Score a task: ln p(" " + ending | context) for each ending, as the lm-evaluation-harness does for HellaSwag.

    Args:
        batch_size: endings in one forward pass; they are padded on the right, which a causal model cannot see.
        progress: called with the number of endings scored since the last call.

    Raises:
        ValueError: an ending that does not fit into the model, or one with nothing before it.
    """
    items, shortened = _items(model, tokenizer, questions)
    likelihood = np.empty(len(items))
    order = sorted(range(len(items)), key=lambda i: len(items[i][0]))  # equal lengths together: little padding
    device = model.device
    with torch.no_grad(), evaluating(model), autocast(device, precision):
        for i in range(0, len(order), batch_size):
            batch = order[i : i + batch_size]
            x, y = _padded([items[j] for j in batch])
            losses = loss_of(model, x.to(device), y.to(device), "none")  # (B, T), 0 where ignored
            likelihood[batch] = -losses.double().sum(1).cpu().numpy()
            if progress is not None:
                progress(len(batch))
    right, right_norm = [], []
    first = 0
    for question in questions:
        scores = likelihood[first : first + len(question.endings)]
        lengths = np.array([len(e.encode("utf-8")) for e in question.endings])
        right.append(int(scores.argmax()) == question.label)
        right_norm.append(int((scores / lengths).argmax()) == question.label)
        first += len(question.endings)
    return ChoiceScore(
        acc=float(np.mean(right)),
        acc_interval=bootstrap_interval(right, seed),
        acc_norm=float(np.mean(right_norm)),
        acc_norm_interval=bootstrap_interval(right_norm, seed),
        questions=len(questions),
        shortened=shortened,
    )


def bootstrap_interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979): the same for the same values and seed."""
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [array[generator.integers(0, len(array), len(array))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _items(
    model: CausalModel, tokenizer: Tokenizer, questions: Sequence[Question]
) -> tuple[list[tuple[list[int], int]], int]:
    """(ids, number of ending ids) of every ending of every question, cut on the left to what the model can read."""
    limit = context_of(model) + 1  # the last id is only a target
    items, shortened = [], 0
    for question in questions:
        context = tokenizer.begin + tokenizer.encode(question.context)
        if not context:
            raise ValueError(
                f"{question.where} has an empty context, and {tokenizer!r} has no token that begins a text: nothing "
                f"stands before its endings ({question.endings[0][:40]!r}, …)"
            )
        for ending in question.endings:
            ending_ids = tokenizer.encode(" " + ending)
            if len(ending_ids) >= limit:
                raise ValueError(
                    f"{question.where} has an ending of {len(ending_ids)} tokens, which does not fit "
                    f"block_size={limit - 1}: {ending[:60]!r}…; take the question out, for every model that "
                    "is compared, or a model with a longer context"
                )
            ids = context + ending_ids
            shortened += len(ids) > limit
            items.append((ids[-limit:], len(ending_ids)))
    return items, shortened


def _padded(items: Sequence[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """x, y (B, T): y holds only the ids of the endings, everything else is ignored."""
    length = max(len(ids) for ids, _ in items) - 1
    x = torch.zeros(len(items), length, dtype=torch.int64)
    y = torch.full((len(items), length), IGNORED)
    for row, (ids, ending) in enumerate(items):
        x[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        y[row, len(ids) - 1 - ending : len(ids) - 1] = torch.tensor(ids[-ending:])
    return x, y
