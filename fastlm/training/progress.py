"""What a person sees while training: a live bar in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from collections import deque
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

WINDOW_SECONDS = 10.0  # speed and time left are over the last so many seconds


class Display(Protocol):
    """What the trainer tells about its progress."""

    def start(self, step: int, steps: int) -> None: ...

    def step(self, step: int, loss: float, tokens: int) -> None: ...

    def evaluation(self, step: int, val_loss: float, bits_per_byte: float | None) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


def make_display(console: Console | None = None) -> Unbroken:
    """The live bar on a terminal, plain lines elsewhere."""
    console = console or Console()
    console.on_broken_pipe = _broken_pipe  # type: ignore[method-assign] # rich's would end the process
    return Unbroken(LiveDisplay(console) if console.is_terminal else PlainDisplay(console))


def _broken_pipe() -> None:
    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Unbroken:
    """A display that falls silent when nobody reads it any more (a closed pipe, a full disk): training goes on."""

    def __init__(self, display: Display) -> None:
        self._display: Display | None = display

    def start(self, step: int, steps: int) -> None:
        self._tell("start", step, steps)

    def step(self, step: int, loss: float, tokens: int) -> None:
        self._tell("step", step, loss, tokens)

    def evaluation(self, step: int, val_loss: float, bits_per_byte: float | None) -> None:
        self._tell("evaluation", step, val_loss, bits_per_byte)

    def note(self, text: str) -> None:
        self._tell("note", text)

    def stop(self) -> None:
        self._tell("stop")

    def _tell(self, what: str, *numbers: Any) -> None:
        try:
            if self._display is not None:
                getattr(self._display, what)(*numbers)
        except OSError:
            display, self._display = self._display, None
            with contextlib.suppress(Exception):
                if display is not None:
                    display.stop()


class Speed:
    """Tokens and steps a second over a moving window; a pause (an evaluation) is left out."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int, int]] = deque()  # (seconds, step, tokens in all)
        self._tokens = 0
        self.tokens_per_second = 0.0
        self.steps_per_second = 0.0

    def start(self, step: int) -> None:
        """The clock starts, or goes on after a pause."""
        self._marks.clear()
        self._marks.append((time.perf_counter(), step, self._tokens))

    def update(self, step: int, tokens: int) -> None:
        now = time.perf_counter()
        self._tokens += tokens
        self._marks.append((now, step, self._tokens))
        while len(self._marks) > 2 and now - self._marks[0][0] > WINDOW_SECONDS:
            self._marks.popleft()
        then, first, before = self._marks[0]
        seconds = max(now - then, 1e-9)
        self.tokens_per_second = (self._tokens - before) / seconds
        self.steps_per_second = (step - first) / seconds


def _short(number: float) -> str:
    """In at most six characters: 9,345, 16.6k, 1.2M."""
    if number >= 1e6:
        return f"{number / 1e6:.1f}M"
    return f"{number / 1e3:.1f}k" if number >= 1e4 else f"{number:,.0f}"


class _Base:
    def __init__(self, console: Console):
        self.console = console
        self.speed = Speed()
        self.steps = 0
        self.last_val = ""

    def _left(self, step: int) -> str:
        if not self.speed.steps_per_second:
            return "-:--"
        seconds = int((self.steps - step) / self.speed.steps_per_second)
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class LiveDisplay(_Base):
    """A rich progress bar: loss, validation, tokens/s, time left. All of it fits into 80 columns."""

    def start(self, step: int, steps: int) -> None:
        self.steps = steps
        self.progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("[bold]loss {task.fields[loss]}[/]{task.fields[val]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TextColumn("{task.fields[left]} left"),
            console=self.console,
            expand=True,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task("", total=steps, completed=step, loss="-", val="", speed="-", left="-:--")
        self.progress.start()
        self.speed.start(step)

    def step(self, step: int, loss: float, tokens: int) -> None:
        self.speed.update(step, tokens)
        self.progress.update(
            self.task,
            completed=step,
            loss=f"{loss:.3f}",
            val=self.last_val,
            speed=_short(self.speed.tokens_per_second),
            left=self._left(step),
        )

    def evaluation(self, step: int, val_loss: float, bits_per_byte: float | None) -> None:
        self.last_val = f"  val {val_loss:.3f}" if bits_per_byte is None else f"  val {bits_per_byte:.3f} bits/byte"
        self.progress.update(self.task, val=self.last_val)
        self.speed.start(step)

    def note(self, text: str) -> None:
        self.console.print(Text(text))

    def stop(self) -> None:
        self.progress.stop()


class PlainDisplay(_Base):
    """A line after the first step, at every evaluation, and every `seconds`."""

    def __init__(self, console: Console, seconds: float = 15.0):
        super().__init__(console)
        self.seconds = seconds
        self._last = -math.inf

    def start(self, step: int, steps: int) -> None:
        self.steps = steps
        self.speed.start(step)
        self._last = -math.inf

    def step(self, step: int, loss: float, tokens: int) -> None:
        self.speed.update(step, tokens)
        if time.perf_counter() - self._last >= self.seconds:
            self._last = time.perf_counter()
            speed = f"{self.speed.tokens_per_second:,.0f} tok/s"
            self.note(f"step {step}/{self.steps}  loss {loss:.3f}  {speed}  {self._left(step)} left")

    def evaluation(self, step: int, val_loss: float, bits_per_byte: float | None) -> None:
        bits = "" if bits_per_byte is None else f"  {bits_per_byte:.3f} bits per byte"
        self.note(f"step {step}/{self.steps}  validation loss {val_loss:.3f}{bits}")
        self.speed.start(step)

    def note(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def stop(self) -> None:
        return None
