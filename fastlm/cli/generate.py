"""`fastlm generate`: continue prompts, streaming to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

# The options that `fastlm chat` has, too.
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token every time.")]
TopK = Annotated[int | None, typer.Option(help="Only the k likeliest.", show_default=False)]
TopP = Annotated[
    float | None, typer.Option(help="Only the likeliest that together have this probability.", show_default=False)
]
MinP = Annotated[
    float | None, typer.Option(help="Only those with this part of the likeliest's probability.", show_default=False)
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: makes repetition unlikelier.", show_default=False)
]
DType = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, float16, or auto (as they are stored).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]


def generate(
    model: Annotated[
        Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face model folder.", show_default=False)
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to continue. Several make one batch.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.", min=0)] = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End where this text appears. Any number of times.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts, same text.", min=0, max=2**63 - 1)] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The model's tokenizer, if not in its folder.", show_default=False)
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="Which checkpoint of a run: best or last.")] = "best",
    dtype: DType = "float32",
    device: Device = "auto",
) -> None:
    """Continue one prompt, word by word as it comes, or several at once. Without a prompt, begin a new text."""
    import torch

    from fastlm.cli.loading import end_tokens, load_model
    from fastlm.generation import Sampling
    from fastlm.models.gpt import GPT
    from fastlm.training.loading import load_found

    Sampling(
        temperature, top_k, top_p, min_p, repetition_penalty
    )  # a wrong option is an error before anything is shown
    loaded, vocabulary = load_model(model, tokenizer=tokenizer, which=checkpoint, dtype=dtype, device=device)
    prompts = prompt or [""]
    ids = [vocabulary.begin + vocabulary.encode(p) for p in prompts]
    ends, *_ = load_found(model, checkpoint, lambda folder: end_tokens(folder, vocabulary))
    for text, row in zip(prompts, ids, strict=True):
        if not row:
            raise ValueError("this tokenizer has no end-of-text token to begin with: give a prompt")
        if isinstance(loaded, GPT) and len(row) > loaded.config.block_size:
            raise ValueError(
                f"the prompt {text[:40]!r}… has {len(row)} tokens, the model's context is {loaded.config.block_size}: "
                "give only the end of it"
            )
    stops = [s for s in stop or [] if s]
    streams = [TextStream(vocabulary.stream(), stops) for _ in ids]
    live = len(ids) == 1

    def on_token(row: int, token: int) -> None:
        text = streams[row].push(token) if token not in ends else ""
        if live:
            write(text)

    if live:
        write(prompts[0])
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "eos_token": ends,
        "stop": _stop_rule(vocabulary.decode, stops) if stops else None,
        "generator": torch.Generator(loaded.device).manual_seed(seed),
    }
    loaded.generate(ids, max_new_tokens, stream=on_token, **options)
    for text, stream in zip(prompts, streams, strict=True):
        rest = stream.flush()
        if live:
            write(rest + "\n")
        else:
            typer.echo(f"--- {text!r}\n{text}{stream.text}")


class TextStream:
    """Tokens of one row to text, complete characters only, ending before a stop string.

    Text that may be the beginning of a stop string is held back until it is clear that it is not.
    """

    def __init__(self, decoder: Any, stops: list[str]):
        self._decoder, self._stops = decoder, stops
        self._held = ""
        self.text = ""  # all that has been given out
        self.ended = False

    def push(self, token: int) -> str:
        """Text that can be shown now."""
        return self._emit(self._decoder.push(token), final=False)

    def flush(self) -> str:
        """The rest, at the end."""
        return self._emit(self._decoder.flush(), final=True)

    def _emit(self, new: str, *, final: bool) -> str:
        if self.ended:
            return ""
        self._held += new
        found = [self._held.index(s) for s in self._stops if s in self._held]
        if found:
            out, self._held, self.ended = self._held[: min(found)], "", True
        else:
            keep = 0 if final else max((_overlap(self._held, s) for s in self._stops), default=0)
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _stop_rule(decode: Callable[[list[int]], str], stops: list[str]) -> Callable[[list[int]], bool]:
    # A token is at least one byte, so the newest occurrence lies within the last tokens.
    reach = max(len(s.encode("utf-8")) for s in stops) + 8

    def stopped(continuation: list[int]) -> bool:
        tail = decode(continuation[-reach:])
        return any(s in tail for s in stops)

    return stopped


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
