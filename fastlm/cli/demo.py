"""`fastlm demo`: from text to a trained model, its score and a sample, in a few minutes."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fastlm.data import Tokenizer
    from fastlm.data.prepare import SplitPieces
    from fastlm.training import RunConfig


@dataclass(frozen=True)
class Preset:
    """The sizes of the demo on a kind of device."""

    vocab_size: int
    text_mb: int  # at most so much of the text
    model: dict[str, Any]
    batch_size: int
    lr: float
    steps: int
    minutes: float


# Two cores do some 10^13 FLOPs in three minutes: a model of two million parameters sees about a million tokens. BPE
# rather than bytes: a token stands for three bytes of Python, so the same arithmetic reads three times the text, and a
# window of 128 tokens spans a function.
CPU = Preset(
    vocab_size=2048,
    text_mb=6,
    model={"n_layer": 4, "n_head": 4, "n_embd": 192, "block_size": 128, "bias": False, "position": "rotary"},
    batch_size=16,
    lr=2e-3,
    steps=700,
    minutes=3.0,
)
CUDA = Preset(
    vocab_size=4096,
    text_mb=32,
    model={
        "n_layer": 8,
        "n_head": 8,
        "n_embd": 512,
        "block_size": 256,
        "bias": False,
        "position": "rotary",
        "dropout": 0.1,
    },
    batch_size=64,
    lr=1e-3,
    steps=1500,
    minutes=3.0,
)
WARMUP = 0.05  # part of the steps
EVALUATIONS = 8
TUNING_STEPS = 4  # timed to see how many steps fit into the minutes
SAMPLE_TOKENS = 200


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="A text file or a folder of them. Default: the source of Python's standard library.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder. Default: runs/demo, or the next that is free.", show_default=False),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Train about so long (at most the preset's steps). Default: 3.", show_default=False, min=0.05
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Train exactly so many steps instead.", show_default=False, min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and the sample.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Train a small GPT on real text: a few minutes on two CPU cores, or a larger one on a GPU.

    Leaves a run folder with checkpoints, tokenizer, log.jsonl, config.toml and loss.png.
    """
    from rich.console import Console

    from fastlm.training.run import check_free, start_run
    from fastlm.training.trainer import resolve_device

    console = Console()
    run = out or _free_folder(Path("runs"), "demo")
    check_free(run)
    chosen = resolve_device(device)
    preset = CUDA if chosen.type == "cuda" else CPU
    tokenizer = _prepare(data, run, preset, console)
    config = _config(run, preset, seed, device, steps or preset.steps)
    if steps is None:
        _fit_steps_to_time(config, tokenizer, chosen, (minutes or preset.minutes) * 60)
    result = start_run(config, run)
    if result.reason == "out of time":
        console.print(
            f"out of time at step {result.step}: the machine is slower than it was at the start", soft_wrap=True
        )
    if result.reason.startswith("SIG"):
        from fastlm.cli.train import report

        report(result, run, "train", console)
    _score(run, console)
    _sample(run, "    def __init__(self" if data is None else "", seed, console)
    console.print(
        f"\nrun folder: {run}  (loss.png, log.jsonl, config.toml, tokenizer/, checkpoints/)",
        highlight=False,
        soft_wrap=True,
    )
    prompt = " --prompt '    def'" if data is None else ""
    console.print(f"go on: fastlm generate {run}{prompt}", highlight=False, markup=False, soft_wrap=True)


def _free_folder(parent: Path, name: str) -> Path:
    """parent/name, or parent/name-2, … : the first that does not exist."""
    number = 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _prepare(data: Path | None, run: Path, preset: Preset, console: Console) -> Tokenizer:
    """Train the tokenizer on the training text, and write the token shards into RUN/data."""
    from fastlm.data import BPETokenizer, write_dataset

    pieces = list(_pieces(data, preset.text_mb << 20))
    sizes = {split: sum(len(text.encode("utf-8")) for s, text, _ in pieces if s == split) for split in ("train", "val")}
    wanted = 4 * preset.model["block_size"]  # bytes; whether the tokens suffice the loader checks
    if min(sizes.values()) < wanted:
        raise ValueError(
            f"the text is too short: {sizes['train']:,} bytes to train on and {sizes['val']:,} held out, "
            f"at least {wanted:,} of each are needed"
        )
    tokenizer = BPETokenizer.train((text for split, text, _ in pieces if split == "train"), preset.vocab_size)
    manifest = write_dataset(iter(pieces), run / "data", tokenizer)
    train, held_out = manifest["splits"]["train"], manifest["splits"]["val"]
    what = "the Python standard library's source" if data is None else str(data)
    megabytes = [split["text_bytes"] / 1e6 for split in (train, held_out)]
    console.print(
        f"text: {what}; {megabytes[0]:.2f} MB for training, {megabytes[1]:.2f} MB held out; "
        f"BPE of {tokenizer.vocab_size:,} tokens, {train['text_bytes'] / train['tokens']:.2f} bytes each",
        highlight=False,
        soft_wrap=True,
    )
    return tokenizer


def _pieces(data: Path | None, max_bytes: int) -> SplitPieces:
    from fastlm.data import find_files, read_documents, stdlib_documents
    from fastlm.data.documents import Document, ReadReport
    from fastlm.data.pipeline import split_documents

    if data is None:
        for split, documents in zip(("train", "val"), stdlib_documents(max_bytes), strict=True):
            for document in documents:
                yield split, document.read(), True
        return
    # A single file is cut at max_bytes, of many the first ones are taken: a demo of three minutes cannot read more.
    taken: list[Document] = []
    left = max_bytes
    report = ReadReport()
    for document in read_documents(find_files([data]), report=report):
        text = ""
        for piece in document.pieces():
            text += piece
            if len(text) >= left:
                break
        taken.append(Document.from_text(document.name, text[:left]))
        left -= len(text)
        if left <= 0:
            break
    if not taken:
        raise ValueError(f"there is no text in {data}{report.in_words()}")
    yield from split_documents(taken, 0.1)


def _config(run: Path, preset: Preset, seed: int, device: str, steps: int) -> RunConfig:
    from fastlm.training.config import config_from_dict

    return config_from_dict(
        {
            "model": dict(preset.model),
            "data": {"path": str(run / "data")},
            "training": {
                "steps": steps,
                "batch_size": preset.batch_size,
                "lr": preset.lr,
                "min_lr_ratio": 0.05,
                "warmup_steps": max(1, round(WARMUP * steps)),
                "seed": seed,
                "device": device,
            },
            "evaluation": {"every": max(10, steps // EVALUATIONS), "windows": 64},
            "checkpoint": {"every": 0, "keep_last": 1},
        }
    )


def _fit_steps_to_time(config: RunConfig, tokenizer: Tokenizer, device: Any, seconds: float) -> None:
    """Time a few steps of a model that is thrown away, and take as many as fit into the time, at most the preset's."""
    import torch

    from fastlm.data import TokenData, WindowLoader
    from fastlm.models.gpt import GPT
    from fastlm.training.optimizer import make_optimizer
    from fastlm.training.run import make_model_config

    model = GPT(make_model_config(config, tokenizer)).to(device)  # type: ignore[arg-type] # the objective is causal
    optimizer = make_optimizer(model, config.optimizer, config.training.lr)
    loader = WindowLoader(TokenData.open(config.data.path), config.training.batch_size, model.config.block_size)
    for step in range(1 + TUNING_STEPS):
        if step == 1:  # the first one warms up
            began = time.perf_counter()
        x, y = loader.next_batch()
        model(x.to(device), y.to(device))[1].backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    step_seconds = (time.perf_counter() - began) / TUNING_STEPS
    steps = max(1, min(config.training.steps, math.floor(seconds / step_seconds)))
    config.training.steps = steps
    config.training.max_minutes = 2 * seconds / 60  # should the machine become busy meanwhile
    config.training.warmup_steps = max(1, round(WARMUP * steps))
    config.evaluation.every = max(10, steps // EVALUATIONS)


def _score(run: Path, console: Console) -> None:
    """Bits per byte on the held-out text, beside gzip; and the picture with gzip's line."""
    from rich.table import Table

    from fastlm.cli.loading import load_model
    from fastlm.data import TokenData
    from fastlm.evaluation import score_split
    from fastlm.training.journal import read_journal
    from fastlm.training.plot import picture_or_note, plot_losses
    from fastlm.training.run import LOG, PICTURE

    model, tokenizer = load_model(run)
    val = TokenData.open(run / "data", "val")
    with console.status("scoring the held-out text") if console.is_terminal else contextlib.nullcontext():
        score = score_split(model, tokenizer, val, batch_size=32)
    assert score.gzip_bits_per_byte is not None
    scale = math.log(2) * val.bytes_per_token
    first = next(r for r in read_journal(run / LOG) if r["kind"] == "step")
    with picture_or_note(run / PICTURE, lambda text: console.print(text, markup=False)):
        plot_losses(
            run / LOG,
            run / PICTURE,
            title="fastlm demo",
            bytes_per_token=val.bytes_per_token,
            gzip_bits=score.gzip_bits_per_byte,
        )
    console.print(
        f"\nheld-out text: {score.text_bytes:,} bytes, {score.tokens:,} tokens, each scored once", highlight=False
    )
    table = Table()
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_row("untrained (training loss at step 1)", f"{first['loss'] / scale:.3f}")
    table.add_row("gzip -9 of the held-out text", f"{score.gzip_bits_per_byte:.3f}")
    table.add_row("[bold]this model[/]", f"[bold]{score.bits_per_byte:.3f}[/]")
    console.print(table)
    console.print(f"loss {score.loss:.3f} nats per token, perplexity {score.perplexity:.1f}", highlight=False)


def _sample(run: Path, prompt: str, seed: int, console: Console) -> None:
    import torch
    from rich.rule import Rule
    from rich.text import Text

    from fastlm.cli.loading import load_model

    model, tokenizer = load_model(run)
    generator = torch.Generator(model.device).manual_seed(seed)
    ids = model.generate(
        [tokenizer.begin + tokenizer.encode(prompt)], SAMPLE_TOKENS, temperature=0.7, top_k=40, generator=generator
    )
    console.print(Rule("sample"))
    console.print(Text(tokenizer.decode(ids[0].tolist())), soft_wrap=True)
    console.print(Rule())
