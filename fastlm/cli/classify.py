"""`fastlm classify`: a fine-tuned classifier on texts, or its score on a labelled file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def classify(
    run: Annotated[Path, typer.Argument(help="A run of `fastlm finetune --task classification`.", show_default=False)],
    text: Annotated[list[str] | None, typer.Option(help="A text. Any number of times.", show_default=False)] = None,
    data: Annotated[
        Path | None, typer.Option(help="A labelled .tsv, .csv or .jsonl file: how many are right.", show_default=False)
    ] = None,
    text_column: Annotated[str, typer.Option(help="Of --data.")] = "text",
    label_column: Annotated[str, typer.Option(help="Of --data.")] = "label",
    picture: Annotated[
        Path | None, typer.Option(help="Write the confusion matrix of --data here (PNG).", show_default=False)
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="Which checkpoint of a run: best or last.")] = "best",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """The classes of texts with their probabilities, or accuracy and macro-F1 on labelled ones."""
    from dataclasses import asdict

    from fastlm.cli.finetune import shown
    from fastlm.data import load_tokenizer
    from fastlm.evaluation.classes import plot_confusion
    from fastlm.models.classifier import Classifier
    from fastlm.tasks.classification import ClassificationSettings, evaluate, predict, read_examples
    from fastlm.training.loading import load_found
    from fastlm.training.trainer import resolve_device

    if bool(text) == (data is not None):
        raise typer.BadParameter("give either --text or --data")
    if not all(line.strip() for line in text or []):
        raise ValueError("an empty text has no class")
    model, _, tokenizer_path = load_found(run, checkpoint, Classifier.from_pretrained)
    model, tokenizer = model.to(resolve_device(device)), load_tokenizer(tokenizer_path)
    if data is not None:
        columns = ClassificationSettings(text_column=text_column, label_column=label_column)
        score = evaluate(model, tokenizer, read_examples(str(data), columns), str(data))
        if as_json:
            typer.echo(json.dumps(asdict(score)))
        else:
            for name, value in asdict(score).items():
                typer.echo(f"{name:20} {shown(value)}")
        if picture is not None:
            plot_confusion(score, picture)
        return
    for line, row in zip(text or [], predict(model, tokenizer, text or []).tolist(), strict=True):
        probabilities = dict(zip(model.config.labels, row, strict=True))
        best = max(probabilities, key=lambda label: probabilities[label])
        if as_json:
            typer.echo(json.dumps({"text": line, "label": best, "probabilities": probabilities}, ensure_ascii=False))
        else:
            typer.echo(f"{best}  {probabilities[best]:.3f}  {line}")
