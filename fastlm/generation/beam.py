"""Beam search: the likeliest continuation that K hypotheses side by side can find."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fastlm.generation.cache import KVCache
from fastlm.nn.modes import evaluating

if TYPE_CHECKING:
    from fastlm.models.gpt import GPT


class Continuations(Protocol):
    """A model in the middle of its continuations, one a row."""

    def first(self) -> Tensor:
        """The logits of the first new token, (rows, V)."""
        ...

    def next(self, tokens: Tensor) -> Tensor:
        """The logits after one more token for each row, (rows) -> (rows, V)."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may be there several times: (N) int64."""
        ...


@dataclass(frozen=True)
class Hypothesis:
    """A continuation without its end token, and its score: ln p over the length penalty, the end token counted."""

    tokens: list[int]
    score: float


def penalised(log_probability: float, length: int, length_penalty: float) -> float:
    """ln p / length^a: 0 prefers short continuations, 1 takes the mean of a token, more prefers long ones."""
    return log_probability / length**length_penalty


@torch.no_grad()
def beam_search(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_token: int,
    beams: int = 4,
    length_penalty: float = 1.0,
) -> list[Hypothesis]:
    """The best continuation of each prompt that ends with `eos_token`, or, where none does, the best unfinished one.

    Prompts of one length go through the model together.

    Args:
        prompts: token ids, each from 1 token to fewer than the model's block_size.
        max_new_tokens: at most so many, the end token included, and at most what the context has room for.
        beams: hypotheses kept for each prompt; 1 is greedy decoding.
        length_penalty: the exponent a in ln p / length^a (as in Wu et al., arXiv:1609.08144, but for its constant).

    Raises:
        ValueError: an option or a prompt is out of its range.
    """
    check_options(beams, max_new_tokens, model.config.vocab_size)
    context = model.config.block_size
    for row, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < context:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; wanted at least 1 and fewer than block_size = {context}"
            )
    results: list[Hypothesis | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with evaluating(model):
        for length, same in itertools.groupby(order, key=lambda row: len(prompts[row])):
            rows = list(same)
            begun = torch.tensor([list(prompts[row]) for row in rows], device=model.device)
            steps = min(max_new_tokens, context - length)
            found = search(_GPTContinuations(model, begun), len(rows), steps, eos_token, beams, length_penalty)
            for row, hypothesis in zip(rows, found, strict=True):
                results[row] = hypothesis
    return [r for r in results if r is not None]


def check_options(beams: int, max_new_tokens: int, vocab_size: int) -> None:
    """Raise ValueError for options of a search that make no sense."""
    if beams < 1 or 2 * beams > vocab_size:
        raise ValueError(f"beams must be from 1 to half of the vocabulary ({vocab_size // 2}), got {beams}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def search(
    continuations: Continuations,
    prompts: int,
    max_new_tokens: int,
    eos_token: int,
    beams: int,
    length_penalty: float,
) -> list[Hypothesis]:
    """Beam search over any continuations that begin with one row for each prompt; see `beam_search`.

    Of the 2 K likeliest continuations of a prompt's K hypotheses, K that do not end go on. One that ends is finished
    only where it is among the K likeliest, as one that goes on has to be: so a single beam is greedy decoding. A prompt
    is done when K have finished and no hypothesis that goes on scores better now.
    """
    logits = continuations.first()
    device, vocab = logits.device, logits.shape[-1]
    finished: list[list[Hypothesis]] = [[] for _ in range(prompts)]
    open_prompts = list(range(prompts))
    width = 1  # hypotheses of each open prompt: one at first
    scores = torch.zeros(prompts, 1, device=device)  # ln p of the hypotheses that go on, (prompts, width)
    tokens: list[list[list[int]]] = [[[]] for _ in range(prompts)]  # of the open prompts
    for step in range(1, max_new_tokens + 1):
        log_p = torch.log_softmax(logits.float(), -1).view(len(open_prompts), width, vocab)
        total = (scores[:, :, None] + log_p).flatten(1)  # (prompts, width V)
        best, index = total.topk(2 * beams, dim=1)  # in falling order
        best_list, index_list = best.tolist(), index.tolist()
        rows: list[int] = []
        still: list[int] = []
        new_tokens, new_scores, chosen = [], [], []
        for p, prompt in enumerate(open_prompts):
            going: list[tuple[float, int, int]] = []
            for place, (score, flat) in enumerate(zip(best_list[p], index_list[p], strict=True)):
                parent, token = divmod(flat, vocab)
                if token == eos_token:
                    if place >= beams:
                        continue
                    finished[prompt].append(Hypothesis(tokens[p][parent], penalised(score, step, length_penalty)))
                elif len(going) < beams:
                    going.append((score, parent, token))
            kept = sorted(finished[prompt], key=lambda h: h.score, reverse=True)[:beams]
            finished[prompt] = kept
            best_going = penalised(going[0][0], step, length_penalty)
            if step == max_new_tokens and not kept:
                finished[prompt] = [Hypothesis([*tokens[p][going[0][1]], going[0][2]], best_going)]
            if step == max_new_tokens or (len(kept) == beams and kept[-1].score >= best_going):
                continue
            still.append(prompt)
            rows += [p * width + parent for _, parent, _ in going]
            chosen += [token for _, _, token in going]
            new_scores.append([score for score, _, _ in going])
            new_tokens.append([[*tokens[p][parent], token] for _, parent, token in going])
        open_prompts, tokens = still, new_tokens
        if not open_prompts:
            break
        width, scores = beams, torch.tensor(new_scores, device=device)
        continuations.keep(torch.tensor(rows, device=device))
        logits = continuations.next(torch.tensor(chosen, device=device))
    return [max(hypotheses, key=lambda h: h.score) for hypotheses in finished]


class _GPTContinuations:
    """A GPT's `Continuations` of prompts of one length, (rows, T)."""

    def __init__(self, model: GPT, prompts: Tensor) -> None:
        self._model, self._prompts = model, prompts
        self._cache = KVCache(model.config.n_layer, prompts.shape[1] + 32)

    def first(self) -> Tensor:
        return self.next_of(self._prompts)

    def next(self, tokens: Tensor) -> Tensor:
        return self.next_of(tokens[:, None])

    def next_of(self, idx: Tensor) -> Tensor:
        return self._model.logits(self._model.hidden_states(idx, cache=self._cache)[:, -1])

    def keep(self, rows: Tensor) -> None:
        self._cache.keep(rows)
