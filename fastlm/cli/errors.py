"""How errors reach the terminal: what the user can mend is one line; a traceback is for our own mistakes."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperGroup

TRACEBACK = "FASTLM_TRACEBACK"


class FriendlyGroup(TyperGroup):
    """Prints bad input (ValueError), file errors (OSError), an unsupported backend and a full GPU as one message;
    exit code 1. A reader that has gone (`fastlm generate … | head`) is no error: exit code 0.

    With FASTLM_TRACEBACK=1 in the environment the exception passes through.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except SystemExit as end:  # so rich and typer end the process where a pipe is broken, --help's too
            if isinstance(end.__context__, BrokenPipeError):
                raise SystemExit(0) from None
            raise

    def invoke(self, ctx: Any) -> Any:
        from fastlm.ops.registry import check_environment

        try:
            check_environment()
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # typer's to handle: it sees to it that nothing more is flushed
        except Exception as error:
            if os.environ.get(TRACEBACK) or not _is_for_the_user(error):
                raise
            typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
            typer.echo(f"{_message(error)}", err=True)
            raise typer.Exit(1) from None


def _is_for_the_user(error: Exception) -> bool:
    if isinstance(error, (ValueError, OSError)):
        return True
    import torch

    from fastlm import UnsupportedError

    return isinstance(error, (UnsupportedError, torch.OutOfMemoryError))


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
