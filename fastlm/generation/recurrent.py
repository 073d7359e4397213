"""Generation from a recurrent model: its state is all that there is to keep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlm.generation.prompts import Prompts, checked_prompts
from fastlm.generation.sampling import Sampling
from fastlm.generation.stopping import Stop, eos_tokens, stop_rule
from fastlm.nn.modes import evaluating

if TYPE_CHECKING:
    from fastlm.models.lstm import LSTMLM


@torch.no_grad()
def generate_recurrent(
    model: LSTMLM,
    idx: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_token: int | Sequence[int] | None = None,
    stop: Stop | None = None,
    pad_token: int | None = None,
    generator: torch.Generator | None = None,
    stream: Callable[[int, int], object] | None = None,
) -> Tensor | list[Tensor]:
    """Continue each prompt by up to `max_new_tokens` tokens. Options, result and errors as `generate`'s.

    Prompts of one length are read together, and from then on all rows go together. There is no limit to the length. A
    tensor of prompts gives a tensor: rows that finish before the others are filled with `pad_token`, default:
    the (first) `eos_token`, or 0.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = checked_prompts(idx, model.config.vocab_size, model.device)
    finished_by = stop_rule(stop, eos_token)
    pad_token = next(iter(eos_tokens(eos_token)), 0) if pad_token is None else pad_token
    continuations: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        rows, states, hidden = _read(model, prompts)
        seen = _seen(model, prompts, rows) if repetition_penalty is not None else None
        for step in range(max_new_tokens if prompts else 0):
            logits = model.logits(states)  # (rows still open, V)
            if torch.isnan(logits).any():
                raise RuntimeError(f"the model's logits are NaN at new token {step + 1}: are its weights finite?")
            tokens = sampling(logits, seen, generator)
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                continuations[row].append(token)
                if stream is not None:
                    stream(row, token)
            if finished_by is not None:
                going = [i for i, row in enumerate(rows) if not finished_by(continuations[row])]
                if len(going) < len(rows):
                    index = torch.tensor(going, dtype=torch.int64, device=tokens.device)
                    rows, tokens = [rows[i] for i in going], tokens[index]
                    hidden = hidden[0][:, index], hidden[1][:, index]
                    seen = None if seen is None else seen[index]
            if not rows:
                break
            y, hidden = model.hidden_states(tokens[:, None], hidden)
            states = y[:, -1]
    results = [torch.cat((p, p.new_tensor(c))) for p, c in zip(prompts, continuations, strict=True)]
    if not isinstance(idx, Tensor):
        return results
    if not results:
        return torch.empty(0, 0, dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(results, batch_first=True, padding_value=pad_token)


def _read(model: LSTMLM, prompts: list[Tensor]) -> tuple[list[int], Tensor, tuple[Tensor, Tensor]]:
    """The rows in the order of their lengths, what the head reads after each prompt (rows, H), and the states."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    last, hidden, cells = [], [], []
    for _, same in itertools.groupby(order, key=lambda row: len(prompts[row])):
        y, state = model.hidden_states(torch.stack([prompts[row] for row in same]))
        last.append(y[:, -1])
        hidden.append(state[0])
        cells.append(state[1])
    if not order:
        return [], torch.empty(0), (torch.empty(0), torch.empty(0))
    return order, torch.cat(last), (torch.cat(hidden, 1), torch.cat(cells, 1))


def _seen(model: LSTMLM, prompts: list[Tensor], rows: list[int]) -> Tensor:
    """(rows, V): which tokens the prompts have."""
    seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=model.device)
    for i, row in enumerate(rows):
        seen[i, prompts[row]] = True
    return seen
