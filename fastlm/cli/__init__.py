"""The command `fastlm`: one module a command. Bad input ends in one line on stderr and a non-zero exit code."""

from __future__ import annotations

import typer

from fastlm.cli.bench import bench
from fastlm.cli.chat import chat
from fastlm.cli.classify import classify
from fastlm.cli.demo import demo
from fastlm.cli.errors import FriendlyGroup
from fastlm.cli.evaluate import evaluate
from fastlm.cli.fill import fill
from fastlm.cli.finetune import finetune
from fastlm.cli.generate import generate
from fastlm.cli.info import info
from fastlm.cli.prepare import prepare
from fastlm.cli.train import train
from fastlm.cli.translate import translate
from fastlm.cli.tune import tune

app = typer.Typer(
    name="fastlm",
    cls=FriendlyGroup,
    help="Train, fine-tune, evaluate and sample language models, fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (demo, prepare, train, finetune, evaluate, generate, chat, fill, classify, translate, info, tune, bench):
    app.command()(command)


def main() -> None:
    """The console command."""
    app()
