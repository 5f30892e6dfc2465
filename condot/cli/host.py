"""What the process lets training do: condot may be its program, or a guest in somebody's notebook.

A program ends with its signals and by its own status. A guest hears signals only while it trains,
gives them back, and never ends the process that it is in.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from condot.core.process import SIGNALS, InterruptHandler, exit_if_distributed, stopper_of_program


@dataclass(frozen=True)
class Host:
    """How training is told to stop, and whether it may end the process."""

    interrupt: InterruptHandler
    owns_process: bool = True

    def leave(self, status: int) -> None:
        """End the process of a launch at once, where it is ours: see `exit_if_distributed`."""
        if self.owns_process:
            exit_if_distributed(status)


def program_host() -> Host:
    """Return the host of a command."""
    return Host(stopper_of_program())


@contextlib.contextmanager
def guest_host() -> Iterator[Host]:
    """Give the host of a call from Python; the signals that were taken meanwhile are given back at the end."""
    interrupt = GuestInterruptHandler()
    try:
        yield Host(interrupt, owns_process=False)
    finally:
        interrupt.release()


class GuestInterruptHandler(InterruptHandler):
    """Remembers that a signal came while the loop runs; before and after, Python's own way holds.

    The first one lets the step end, and training saves and returns; a second Ctrl-C more than a
    second later is a KeyboardInterrupt. In a thread other than the main one Python hands out no
    signals, and none is taken.
    """

    def __init__(self) -> None:
        super().__init__("", install=False)
        self._previous: dict[int, Any] = {}

    def defer(self) -> None:
        """Take the signals: from now on the loop looks at `requested`."""
        super().defer()
        if threading.current_thread() is threading.main_thread() and not self._previous:
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, which cannot be put back from it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None, why: str = "") -> None:
        if self.requested:
            if number == signal.SIGINT and time.monotonic() - self._received_at > 1:
                raise KeyboardInterrupt
            return
        self.received, self._received_at = number, time.monotonic()
        with contextlib.suppress(RuntimeError):  # the stream may be in the middle of another text
            print("\nstopping after this step; Ctrl-C again to stop at once.", file=sys.stderr, flush=True)
