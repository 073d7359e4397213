"""Ctrl-C and SIGTERM ask the training loop to save and leave; they do not tear it apart."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager: the first signal is noted in `received`; a second one acts as it always does.

    Args:
        say: tell on stderr at once what the first one does, for a step may take minutes.
    """

    def __init__(self, say: bool = False) -> None:
        self.say = say
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        if self.say:
            name = "Ctrl-C" if number == signal.SIGINT else self.received.name
            text = f"\n{name}: the run stops and saves after this step; a second {name} quits now, without saving\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())  # not by the display: the signal may have come in the middle of its print

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
