"""How well a model predicts a text: loss, perplexity, bits per byte, every token scored exactly once."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fastlm.data import TokenData, Tokenizer
from fastlm.evaluation.recurrent import CausalModel, score_recurrent
from fastlm.models.lstm import LSTMLM
from fastlm.nn.modes import autocast, evaluating
from fastlm.ops.linear_cross_entropy import IGNORED


@dataclass(frozen=True)
class TextScore:
    """A model's score on a text.

    Attributes:
        loss: nats per token.
        perplexity: exp(loss).
        bits_per_byte: of UTF-8 text; comparable between tokenizers, and with compressors.
        gzip_bits_per_byte: what `gzip -9` needs for the same bytes; None where there was no text beside the ids.
        tokens: tokens scored.
        text_bytes: bytes of text they stand for.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    gzip_bits_per_byte: float | None
    tokens: int
    text_bytes: int


def score_text(model: CausalModel, tokenizer: Tokenizer, text: str, **options: object) -> TextScore:
    """Score one text. Options as for `score_tokens`; ValueError for an empty text."""
    if not text:
        raise ValueError("the text is empty: there is nothing to score")
    ids = np.asarray(tokenizer.encode_batch([text])[0])
    raw = text.encode("utf-8")
    first = next(iter(tokenizer.begin), None)
    # Where nothing stands before the text, its first token is not scored. Part of a character decodes to U+FFFD.
    unscored = tokenizer.decode(ids[:1]).strip("\ufffd") if first is None else ""
    text_bytes = len(raw) - len(unscored.encode("utf-8"))
    return _score(model, ids, first, text_bytes, gzip_bits_per_byte(raw), **options)


def score_split(model: CausalModel, tokenizer: Tokenizer, data: TokenData, **options: object) -> TextScore:
    """Score a split of a dataset: its shards one after the other, the ends of documents included in the loss.

    gzip gets the same documents, decoded and written one after the other.
    """
    ids = np.concatenate(data.arrays)
    ends = np.flatnonzero(ids == data.eot)
    documents = [ids[a:b] for a, b in zip(np.concatenate(([0], ends + 1)), [*ends, len(ids)], strict=True)]
    text = "".join(tokenizer.decode(document.tolist()) for document in documents).encode("utf-8")
    return _score(model, ids, data.eot, data.text_bytes, gzip_bits_per_byte(text), **options)


def gzip_bits_per_byte(raw: bytes) -> float:
    """Bits that gzip at its best level needs for each byte."""
    return 8 * len(gzip.compress(raw, compresslevel=9, mtime=0)) / len(raw)


def score_tokens(
    model: CausalModel,
    ids: np.ndarray,
    *,
    first: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
    progress: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Sum of -ln p(token | the tokens before it) over the ids, and how many were scored.

    A window of block_size tokens slides over the text by `stride`; of each window only the tokens are scored that no
    window before it has scored. So every token is scored once, and all but those at the start have at least
    block_size - stride tokens before them.

    A recurrent model reads the text once, its state carried from the beginning to the end.

    Args:
        ids: 1-D.
        first: an id put before the text (see `Tokenizer.begin`), so that its first token is scored, too. None: the
            first token is not scored.
        stride: default block_size // 2. Smaller is slower and gives each token more context.
        batch_size: windows in one forward pass.
        precision: "fp32", or "bf16" for autocast.
        progress: called with the number of tokens scored since the last call.

    Raises:
        ValueError: nothing to score, or a stride that would leave tokens out.
    """
    if isinstance(model, LSTMLM):
        if stride is not None:
            raise ValueError(
                f"a recurrent model reads the text from its beginning, without windows; got stride={stride}"
            )
        return score_recurrent(model, ids, first=first, precision=precision, progress=progress)
    block_size = model.config.block_size
    stride = block_size // 2 or 1 if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"stride must be between 1 and block_size={block_size} so that no token is left out, got {stride}"
        )
    sequence = np.asarray(ids).astype(np.int64)
    if first is not None:
        sequence = np.concatenate(([first], sequence))
    if len(sequence) < 2:
        raise ValueError(f"nothing to score: {len(sequence)} token, at least 2 are needed")
    device = model.device
    total, count = 0.0, 0
    with torch.no_grad(), evaluating(model), autocast(device, precision):
        for x, y in _window_batches(sequence, block_size, stride, batch_size):
            scored = int((y != IGNORED).sum())
            _, loss = model(x.to(device), y.to(device), reduction="sum")
            total += float(loss)  # type: ignore[arg-type]
            count += scored
            if progress is not None:
                progress(scored)
    return total, count


def _windows(length: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first target): inputs begin..end-1, targets begin+1..end, of which the first new one is named."""
    last = length - 1  # the last position that is a target
    end = min(block_size, last)
    scored_to = 0
    while True:
        yield max(0, end - block_size), end, scored_to + 1
        if end == last:
            return
        scored_to, end = end, min(end + stride, last)


def _window_batches(
    sequence: np.ndarray, block_size: int, stride: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches x, y (B, T). All windows are equally long: a text shorter than block_size is a single window."""
    xs: list[np.ndarray] = []
    ys: list[np.ndarray] = []
    for begin, end, first_target in _windows(len(sequence), block_size, stride):
        y = sequence[begin + 1 : end + 1].copy()
        y[: first_target - begin - 1] = IGNORED
        xs.append(sequence[begin:end])
        ys.append(y)
        if len(xs) == batch_size:
            yield torch.from_numpy(np.stack(xs)), torch.from_numpy(np.stack(ys))
            xs, ys = [], []
    if xs:
        yield torch.from_numpy(np.stack(xs)), torch.from_numpy(np.stack(ys))


def _score(
    model: CausalModel, ids: np.ndarray, eot: int | None, text_bytes: int, gzip_bits: float, **options: object
) -> TextScore:
    total, count = score_tokens(model, ids, first=eot, **options)  # type: ignore[arg-type]
    loss = total / count
    bits = total / math.log(2) / text_bytes
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return TextScore(loss, perplexity, bits, gzip_bits, count, text_bytes)
