"""Trying again: which errors may pass, how long to wait, when to give up, and what is said about it.

The clock of the deadline starts anew with every byte that was not had before:
a large file on a slow line is no failure, a source that breaks at the same
byte each time is one.
"""

from __future__ import annotations

import random
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from .locators import redact
from .printable import printable

MISMATCHES = 3
"""Whole downloads of the wrong content before that is believed."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds; pauses double from one to the other, and each is shortened at random by up to half."""
PASSING = (408, 425, 429)
"""HTTP answers below 500 that may be another one next time."""
LINES_A_SECOND = 1.0
LONGEST = 1000
"""Characters of an error that are told: a server may answer with kilobytes."""


class Mismatch(Exception):
    """All of a file arrived, and it is not the file."""


class HttpError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, reason: str, retry_after: str) -> None:
        super().__init__(printable(f"HTTP {status} {reason[:LONGEST]}".strip()))
        self.status = status
        self.retry_after = float(retry_after) if re.fullmatch(r"\d{1,6}", retry_after) else 0.0


class OurDisk(OSError):
    """The file on this machine cannot be written: no fault of the source's."""


@dataclass
class Patience:
    """Attempts at one file.

    Args:
        what: how messages call it.
        seconds: it is given up when it brought nothing new for so long.
    """

    what: str
    seconds: float
    best: int = 0
    failures: int = 0
    tries: int = 0
    mismatches: int = 0

    def progress(self, done: int) -> None:
        """So many bytes are had."""
        if done > self.best:
            self.best, self.since, self.failures = done, time.monotonic(), 0

    def __call__(self, attempt: Callable[[], None], between: Callable[[], object]) -> None:
        """Try until it succeeds, cannot, or the deadline is over; `between` is called before every new attempt.

        Raises:
            FileNotFoundError: it is not there.
            OurDisk: it cannot be written here.
            ValueError: it cannot be had.
        """
        self.since = time.monotonic()
        while True:
            self.tries += 1
            try:
                return attempt()
            except (FileNotFoundError, OurDisk):
                raise
            except Exception as error:  # the filesystems of many makers have errors of their own
                if status_of(error) in (404, 410):
                    raise FileNotFoundError(one_line(error)) from error
                self._wait(error)
            between()

    def _wait(self, error: Exception) -> None:
        if isinstance(error, Mismatch):
            self.mismatches += 1
            if self.mismatches == MISMATCHES:
                raise ValueError(
                    f"{self.what}: {one_line(error)}, {MISMATCHES} downloads in a row. It was changed or damaged: upload it again, "
                    f"or index the folder again."
                ) from error
        elif not may_pass(error):
            raise ValueError(f"{self.what} cannot be read: {one_line(error)}. Check the URL and your rights.") from error
        left = self.since + self.seconds - time.monotonic()
        if left <= 0:
            raise ValueError(
                f"{self.what} cannot be read: nothing new in {self.seconds:g} s, {self.tries} attempts, "
                f"the last: {one_line(error)}. Check the network and the server, or raise data.retry_seconds."
            ) from error
        pause = min(LONGEST_PAUSE, min(FIRST_PAUSE, self.seconds / 60) * 2**self.failures) * random.uniform(0.5, 1)
        pause = min(left, max(pause, getattr(error, "retry_after", 0.0)))
        self.failures += 1
        say(f"{self.what}: {one_line(error)}; trying again in {pause:.1f} s, giving up in {left:.0f} s")
        time.sleep(pause)


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    status = status_of(error)
    if status:
        return status >= 500 or status in PASSING
    if "Credentials" in type(error).__name__:  # botocore's, which is no error of rights to Python
        return False
    never = (
        PermissionError,
        IsADirectoryError,
        NotADirectoryError,
        ImportError,
        ValueError,
        TypeError,
        NotImplementedError,
        AttributeError,
    )
    return not isinstance(error, never)


def status_of(error: BaseException) -> int:
    """The HTTP status behind an error, wherever its library keeps it; 0 where there is none."""
    for holder, name in ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")):
        found = str(getattr(holder, name, ""))
        if found.isdigit() and 400 <= int(found) < 600:
            return int(found)
    return 0


def one_line(error: BaseException) -> str:
    """Return what an error says, whatever library raised it, on one line that may be printed: see `redact` and `printable`."""
    text = printable(redact(" ".join(str(error).split()))) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


_lock = threading.Lock()
_said_at, _unsaid = -1e9, 0


def say(text: str) -> None:
    """A line on stderr, at most one a second: a broken network breaks every download at once."""
    global _said_at, _unsaid
    with _lock:
        if time.monotonic() < _said_at + 1 / LINES_A_SECOND:
            _unsaid += 1
            return
        more = f" ({_unsaid} more like it)" if _unsaid else ""
        _said_at, _unsaid = time.monotonic(), 0
    print(f"{printable(redact(text))}{more}", file=sys.stderr, flush=True)
