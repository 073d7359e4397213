"""`fastlm finetune`: a trained model learns a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def finetune(
    model: Annotated[
        Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face model folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The run folder to make.", show_default=False)],
    task: Annotated[str, typer.Option(help="classification, text, …", show_default=False)] = "",
    train: Annotated[Path | None, typer.Option(help="What to learn from (task.train).", show_default=False)] = None,
    val: Annotated[
        Path | None, typer.Option(help="To choose the checkpoint by (task.val).", show_default=False)
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="For the metrics at the end (task.test).", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings (TOML).", show_default=False)] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train adapters of this rank instead of all weights.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting: --set training.lr=3e-4, --set task.label_column=stars."),
    ] = None,
) -> None:
    """Fine-tune a model: on labelled texts, on a text, … The data's form and columns are settings of the task."""
    import os

    from rich.console import Console

    from fastlm.cli.train import report
    from fastlm.tasks.registry import DEFAULTS
    from fastlm.tasks.registry import finetune as run_finetune
    from fastlm.training import load_config

    overrides = [*(set_ or []), f"task.model='{model}'"]
    overrides += [f"task.name='{task}'"] if task else []
    overrides += [f"task.{n}='{p}'" for n, p in (("train", train), ("val", val), ("test", test)) if p is not None]
    overrides += [] if lora_rank is None else [f"lora.rank={lora_rank}"]
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    result, metrics = run_finetune(load_config(config, overrides, DEFAULTS), out)
    for name, value in metrics.items():
        console.print(f"{name:20} {shown(value)}", highlight=False)
    report(result, out, console)


def shown(value: Any) -> str:
    """A metric in a line."""
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, (list, tuple)):
        return "  ".join(shown(v) for v in value)
    return str(value)
