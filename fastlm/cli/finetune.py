"""`fastlm finetune`: a trained model learns a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def finetune(
    model: Annotated[
        Path | None, typer.Argument(help="A run, a checkpoint, or a Hugging Face model folder.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder to make.", show_default=False)] = None,
    task: Annotated[str, typer.Option(help="classification, text or translation.", show_default=False)] = "",
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
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run from its newest checkpoint.", show_default=False)
    ] = None,
) -> None:
    """Fine-tune a model: on labelled texts, on a text, on pairs. The data's form and columns are settings of the task.

    Ctrl-C and SIGTERM save a checkpoint and leave; --resume goes on exactly where the run stopped."""
    import os

    from rich.console import Console

    from fastlm.cli.train import report
    from fastlm.tasks.epochs import let_steps_count
    from fastlm.tasks.registry import DEFAULTS
    from fastlm.tasks.registry import finetune as run_finetune
    from fastlm.tasks.registry import resume as run_resume
    from fastlm.training.config import load_config, override

    overrides = [*(set_ or [])]
    overrides += [override("task.name", task)] if task else []
    overrides += [
        override(f"task.{n}", p) for n, p in (("train", train), ("val", val), ("test", test)) if p is not None
    ]
    overrides += [] if lora_rank is None else [f"lora.rank={lora_rank}"]
    if resume is not None:
        if model is not None or out is not None or config is not None:
            raise typer.BadParameter(
                "MODEL, --out and --config are for a new run: a resumed one has its own; change settings with --set"
            )
        run = resume
        result, metrics = run_resume(run, overrides=tuple(overrides))
    elif model is None or out is None:
        raise typer.BadParameter("give MODEL and --out (a new run), or --resume (an old one)")
    else:
        run = out
        overrides.append(override("task.model", model))
        settings = load_config(config, overrides, DEFAULTS)
        let_steps_count(settings, overrides)
        result, metrics = run_finetune(settings, run)
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    for name, value in metrics.items():
        console.print(f"{name:20} {shown(value)}", highlight=False, markup=False, soft_wrap=True)
    report(result, run, "finetune", console)


def shown(value: Any) -> str:
    """A metric in a line, a list of lists in a line each."""
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, (list, tuple)):
        nested = any(isinstance(v, (list, tuple)) for v in value)
        return ("\n" + " " * 21 if nested else "  ").join(shown(v) for v in value)
    return str(value)
