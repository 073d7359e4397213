"""`fastlm train`: start a run from a config, or go on with one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fastlm.training import TrainResult


def train(
    out: Annotated[Path | None, typer.Option(help="The run folder to make.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option(help="Settings (TOML).", show_default=False)] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder made by `fastlm prepare` (data.path).", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: --set training.lr=3e-4. Any number of times.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run from its newest checkpoint.", show_default=False)
    ] = None,
) -> None:
    """Train a model. Ctrl-C and SIGTERM save a checkpoint and leave; --resume goes on exactly where the run stopped."""
    from rich.console import Console

    from fastlm.training import load_config, resume_run, start_run
    from fastlm.training.config import override

    overrides = [*(set_ or []), *([override("data.path", data)] if data else [])]
    if (out is None) == (resume is None):
        raise typer.BadParameter("give either --out (a new run) or --resume (an old one)")
    if resume is not None:
        if config is not None:
            raise typer.BadParameter("--config is for a new run: a resumed one has its own; change settings with --set")
        run = resume
        result = resume_run(run, overrides=tuple(overrides))
    else:
        assert out is not None
        run = out
        result = start_run(load_config(config, overrides), run)
    report(
        result, run, "train", Console(quiet=os.environ.get("RANK", "0") != "0")
    )  # one of torchrun's processes speaks


def report(result: TrainResult, run: Path, command: str, console: Console) -> None:
    """Say how a run of the command ended; stopped by a signal it exits with 128 + its number, as a shell reports it."""
    import signal

    losses = "" if result.train_loss is None else f"  loss {result.train_loss:.4f}"
    losses += "" if result.best_val_loss is None else f"  best validation loss {result.best_val_loss:.4f}"
    done = f"{result.reason} at step {result.step}{losses}  {result.tokens_per_second:,.0f} tok/s"
    console.print(done, highlight=False, soft_wrap=True)
    console.print(f"run: {run}", highlight=False, markup=False, soft_wrap=True)
    if result.reason.startswith("SIG"):
        console.print(
            f"stopped and saved; go on with: fastlm {command} --resume {run}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(128 + signal.Signals[result.reason].value)
