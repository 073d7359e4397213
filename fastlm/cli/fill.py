"""`fastlm fill`: fill in the blank with a masked model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def fill(
    model: Annotated[
        Path, typer.Argument(help="A masked model: a run, a checkpoint, or a model folder.", show_default=False)
    ],
    text: Annotated[list[str], typer.Argument(help="Texts with blanks: [MASK], <mask> or ___.", show_default=False)],
    top: Annotated[int, typer.Option(help="So many guesses for each blank.", min=1)] = 5,
    checkpoint: Annotated[str, typer.Option(help="Which checkpoint of a run: best or last.")] = "best",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Guess the tokens left out of a text: "The capital of France is [MASK]." """
    from fastlm.models.encoder import Encoder
    from fastlm.tasks.fill import fill_blanks
    from fastlm.tasks.pretrained import open_pretrained
    from fastlm.training.loading import load_found
    from fastlm.training.trainer import resolve_device

    _, tokenizer = open_pretrained(model, checkpoint)
    loaded = load_found(model, checkpoint, Encoder.from_pretrained)[0].to(resolve_device(device))
    for line in text:
        guesses, filled = fill_blanks(loaded, tokenizer, line, top)
        typer.echo(filled)
        for row in guesses:
            typer.echo(
                "   "
                + "   ".join(f"{guess.token.strip() or repr(guess.token)} {guess.probability:.3f}" for guess in row)
            )
