"""The command `fastlm`: one module a command. Bad input ends in one line on stderr and a non-zero exit code."""

from __future__ import annotations

import importlib.util

import typer

from fastlm.cli.demo import demo
from fastlm.cli.errors import FriendlyGroup
from fastlm.cli.evaluate import evaluate
from fastlm.cli.generate import generate
from fastlm.cli.info import info
from fastlm.cli.prepare import prepare
from fastlm.cli.train import train

app = typer.Typer(
    name="fastlm",
    cls=FriendlyGroup,
    help="Train, evaluate and sample GPT language models, fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (demo, prepare, train, evaluate, generate, info):
    app.command()(command)
if importlib.util.find_spec("fastlm.cli.bench"):
    app.command()(importlib.import_module("fastlm.cli.bench").bench)


def main() -> None:
    """The console command."""
    app()
