"""Fill in the blank: what a masked model puts in the places left out of a text."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from fastlm.data import Tokenizer
from fastlm.data.special import special_ids
from fastlm.models.encoder import Encoder
from fastlm.nn.modes import evaluating

BLANK = re.compile(r"\[MASK\]|<mask>|____*")  # written in a text: [MASK], <mask>, or three underlines and more


@dataclass(frozen=True)
class Guess:
    """A token for a blank, and its probability there."""

    token: str
    probability: float


@torch.no_grad()
def fill_blanks(model: Encoder, tokenizer: Tokenizer, text: str, top: int = 5) -> tuple[list[list[Guess]], str]:
    """For each blank of the text its likeliest tokens; and the text with the likeliest one in each place.

    A blank is one token: [MASK], <mask> or ___. Each is guessed with the others left out.

    Raises:
        ValueError: no blank, a text longer than the model can read, or a model without mask or head.
    """
    special = special_ids(tokenizer)
    mask = special.mask if model.config.mask_token_id is None else model.config.mask_token_id
    if mask is None:
        raise ValueError("neither the model (mask_token_id) nor the tokenizer ([MASK], <mask>) has a mask")
    pieces = BLANK.split(text)
    if len(pieces) < 2:
        raise ValueError(f"there is no blank in {text[:60]!r}: write [MASK], <mask> or ___ where a token is left out")
    encoded = [tokenizer.encode(_before_blank(piece, last)) for piece, last in _with_last(pieces)]
    ids = encoded[0]
    for piece in encoded[1:]:
        ids = [*ids, mask, *piece]
    framed = special.frame(ids, len(ids) + 2)
    if len(framed) > model.config.block_size:
        raise ValueError(f"the text has {len(framed)} tokens, the model reads {model.config.block_size}")
    idx = torch.tensor([framed], device=model.device)
    with evaluating(model):
        logits, _ = model(idx)
    assert logits is not None
    blanks = [place for place, token in enumerate(framed) if token == mask]
    scores = logits[0, blanks].float()
    scores[:, [i for i in {*special.all(), mask} if i < scores.shape[1]]] = -torch.inf
    scores[:, tokenizer.vocab_size :] = -torch.inf  # ids that stand for nothing
    probability, token = scores.softmax(-1).topk(min(top, tokenizer.vocab_size), dim=-1)
    guesses = [
        [Guess(tokenizer.decode([t]), p) for t, p in zip(row, values, strict=True)]
        for row, values in zip(token.tolist(), probability.tolist(), strict=True)
    ]
    for place, row in zip(blanks, token.tolist(), strict=True):
        framed[place] = row[0]
    return guesses, tokenizer.decode(framed)


def _with_last(pieces: list[str]) -> list[tuple[str, bool]]:
    return [(piece, place == len(pieces) - 1) for place, piece in enumerate(pieces)]


def _before_blank(piece: str, last: bool) -> str:
    """The space before a blank belongs to the token in the blank (byte-level BPE has it at a token's front)."""
    return piece if last else piece.removesuffix(" ")
