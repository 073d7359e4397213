"""`fastlm evaluate`: a model on a text, on a dataset's split, or on multiple-choice questions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face model folder.", show_default=False)
    ],
    text: Annotated[Path | None, typer.Option(help="A text file (UTF-8).", show_default=False)] = None,
    data: Annotated[
        Path | None, typer.Option(help="A dataset folder: its validation split.", show_default=False)
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(help="Questions in HellaSwag's form (JSONL).", show_default=False)
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The model's tokenizer, if not in its folder.", show_default=False)
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="Which checkpoint of a run: best or last.")] = "best",
    stride: Annotated[
        int | None, typer.Option(help="Of the sliding window; default: half the context.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or endings, in one forward pass.", min=1)] = 16,
    limit: Annotated[int | None, typer.Option(help="Only so many questions.", min=1, show_default=False)] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Loss, perplexity and bits per byte (every token scored once), or the accuracy on multiple-choice questions."""
    from rich.console import Console
    from rich.progress import Progress

    from fastlm.cli.loading import load_model
    from fastlm.data import TokenData
    from fastlm.evaluation import read_questions, score_choices, score_split, score_text

    if sum(x is not None for x in (text, data, choices)) != 1:
        raise typer.BadParameter("give one of --text, --data and --choices")
    if precision not in ("fp32", "bf16"):
        raise typer.BadParameter(f"precision must be fp32 or bf16, got {precision}")
    content = _read(text) if text else ""
    questions = read_questions(choices)[:limit] if choices else []
    split = TokenData.open(data, "val") if data else None
    loaded, vocabulary = load_model(model, tokenizer=tokenizer, which=checkpoint, device=device)
    if split is not None and split.fingerprint != vocabulary.fingerprint:
        raise ValueError(
            f"the dataset {data} was made with another tokenizer than the model's; evaluate its text with --text"
        )
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("evaluating", total=None)
        options = {"batch_size": batch_size, "precision": precision, "progress": lambda n: bar.advance(task, n)}
        if questions:
            bar.update(task, total=sum(len(q.endings) for q in questions))
            score = score_choices(loaded, vocabulary, questions, **options)  # type: ignore[arg-type]
        elif split is not None:
            score = score_split(loaded, vocabulary, split, stride=stride, **options)  # type: ignore[assignment]
        else:
            score = score_text(loaded, vocabulary, content, stride=stride, **options)  # type: ignore[assignment]
    if as_json:
        typer.echo(json.dumps(asdict(score)))
        return
    for name, value in asdict(score).items():
        typer.echo(f"{name:20} {_shown(value)}")


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: byte {e.object[e.start]:#04x} at {e.start} ({e.reason})") from None


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, (tuple, list)):
        return " to ".join(_shown(v) for v in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
