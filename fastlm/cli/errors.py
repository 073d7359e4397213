"""How errors reach the terminal: what the user can mend is one line; a traceback is for our own mistakes."""

from __future__ import annotations

import os
import select
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
            if end.code == 1 and isinstance(end.__context__, BrokenPipeError):
                raise SystemExit(0) from None
            raise

    def invoke(self, ctx: Any) -> Any:
        from fastlm.ops.registry import check_environment

        try:
            check_environment()
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _reader_has_gone():
                raise  # typer's to handle: it sees to it that nothing more is flushed
            if os.environ.get(TRACEBACK) or not _is_for_the_user(error):
                raise
            typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
            typer.echo(f"{_message(error)}", err=True)
            raise typer.Exit(1) from None


def _reader_has_gone() -> bool:
    """Whether it is the standard output that nobody reads: another broken pipe, a tracker's say, is an error."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


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
