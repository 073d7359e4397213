"""`fastlm chat`: a conversation with a chat model in the terminal."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from fastlm.cli.generate import Device, DType, MinP, RepetitionPenalty, Temperature, TextStream, TopK, TopP, write
from fastlm.cli.loading import end_tokens, torch_dtype


def chat(
    model: Annotated[
        Path, typer.Argument(help="A Hugging Face folder of a chat model, with its template.", show_default=False)
    ],
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens an answer.", min=1)] = 1024,
    temperature: Temperature = 0.7,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Annotated[int, typer.Option(help="Same seed, same conversation.", min=0, max=2**63 - 1)] = 0,
    dtype: DType = "auto",
    device: Device = "auto",
) -> None:
    """Talk to a chat model. A line is a message; /new begins a new conversation, /exit or the end of the input ends.
    Ctrl-C ends an answer."""
    import torch

    from fastlm.data import BPETokenizer, load_tokenizer
    from fastlm.generation import PrefixCache, Sampling
    from fastlm.generation.chat import ChatTemplate, Message
    from fastlm.models.gpt import GPT
    from fastlm.training.trainer import resolve_device

    # a wrong option is an error before all else
    stored, _ = torch_dtype(dtype), Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    template, vocabulary = ChatTemplate.from_folder(model), load_tokenizer(model)
    if not isinstance(vocabulary, BPETokenizer):
        raise ValueError(f"{model} has no tokenizer.json: a chat template needs its special tokens")
    loaded = GPT.from_pretrained(model, dtype=stored, device=resolve_device(device))
    ends = end_tokens(model, vocabulary)
    generator = torch.Generator(loaded.device).manual_seed(seed)

    begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(begin)
    read = PrefixCache()  # the conversation so far is not read again
    for line in lines():
        if line == "/exit":
            break
        if line == "/new":
            messages = list(begin)
        if not line or line == "/new":
            continue
        asked: list[Message] = [*messages, {"role": "user", "content": line}]
        ids = template.encode(vocabulary, asked)
        room = loaded.config.block_size - len(ids)
        if room < 1:
            typer.echo(
                f"the conversation has {len(ids)} tokens, the model's context is {loaded.config.block_size}: shorten "
                "the message, or begin anew with /new",
                err=True,
            )
            continue
        answer = TextStream(vocabulary.stream(), [])

        def on_token(row: int, token: int, answer: TextStream = answer) -> None:
            write(answer.push(token) if token not in ends else "")

        with contextlib.suppress(KeyboardInterrupt):  # what was said so far stays said
            loaded.generate(
                [ids],
                min(max_new_tokens, room),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                eos_token=ends,
                generator=generator,
                stream=on_token,
                prefix_cache=read,
            )
        write(answer.flush() + "\n")
        messages = [*asked, {"role": "assistant", "content": answer.text}]


def lines() -> Iterator[str]:
    """What is typed, or piped in, line by line."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # input() then edits the line and knows the ones before
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            write("\n")
            return
