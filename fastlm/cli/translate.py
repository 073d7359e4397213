"""`fastlm translate`: a run of `fastlm finetune --task translation` on sentences."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def translate(
    run: Annotated[Path, typer.Argument(help="A run of `fastlm finetune --task translation`.", show_default=False)],
    text: Annotated[
        list[str] | None,
        typer.Option(help="A sentence. Any number of times; without one, the lines of the input.", show_default=False),
    ] = None,
    beams: Annotated[int, typer.Option(help="Hypotheses of the beam search; 1 is greedy.")] = 4,
    length_penalty: Annotated[float, typer.Option(help="Higher prefers longer translations; 0: ln p alone.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64,
    checkpoint: Annotated[str, typer.Option(help="Which checkpoint of a run: best or last.")] = "best",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each sentence.")] = False,
) -> None:
    """Translate sentences, one a line. An empty line stays one: the lines of both sides belong together."""
    from fastlm.data import load_tokenizer
    from fastlm.tasks.translation import longest_source, open_translator
    from fastlm.tasks.translation import translate as translated
    from fastlm.training.loading import find_model, load_found
    from fastlm.training.run import CONFIG, run_config
    from fastlm.training.trainer import resolve_device

    _, tokenizer_path = find_model(run, checkpoint)
    made_by = tokenizer_path.parent
    task = run_config(made_by).task.get("name", "pretraining") if (made_by / CONFIG).is_file() else "translation"
    if task != "translation":
        raise ValueError(f"{run} is a run of {task}, wanted one of `fastlm finetune --task translation`")
    model = load_found(run, checkpoint, open_translator)[0].to(resolve_device(device))
    tokenizer = load_tokenizer(tokenizer_path)
    lines = text or [line.rstrip("\r\n") for line in sys.stdin]
    for line in lines:
        longest, length = longest_source(model.config.block_size), len(tokenizer.encode(line))
        if length > longest:
            raise ValueError(f"the sentence {line[:40]!r}… has {length} tokens, this model translates up to {longest}")
    sentences = [line for line in lines if line.strip()]
    results = iter(translated(model, tokenizer, sentences, beams, length_penalty, max_new_tokens) if sentences else [])
    for line in lines:
        result = next(results) if line.strip() else ""
        typer.echo(json.dumps({"source": line, "translation": result}, ensure_ascii=False) if as_json else result)
