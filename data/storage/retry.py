"""Trying again: which errors may pass, how long to wait, when to give up, and what is said about it.

The clock of the deadline starts anew with every byte that was not had before:
a large file on a slow line is no failure, a source that breaks at the same
byte each time is one.
"""

from __future__ import annotations

import errno
import math
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from condot.core.printable import one_line, printable, redact

T = TypeVar("T")
NAMES = """EIO ESTALE ETIMEDOUT EAGAIN EINTR EBUSY ENOLCK ENOTCONN EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET
    ECONNABORTED ECONNREFUSED ECONNRESET EREMOTEIO ECOMM ESHUTDOWN ENODEV EPROTO"""
TRANSIENT_ERRNOS = frozenset(getattr(errno, name) for name in NAMES.split() if hasattr(errno, name))
"""What reading a file of a network disk that stalls, or of a mount that is gone for a while, ends in."""
REMEMBERED = 10
"""Times its patience after which a disk that was given up is waited for once more."""
MISMATCHES = 3
"""Whole downloads of the wrong content before that is believed."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds; pauses double from one to the other, and each is shortened at random by up to half."""
TRANSIENT_STATUSES = (408, 425, 429)
"""HTTP answers below 500 that may be another one next time."""
LINES_A_SECOND = 1.0
LONGEST = 1000
"""Characters of an error that are reported: a server may answer with kilobytes."""


class ContentMismatch(Exception):
    """All of a file arrived, and it is not the file."""


class HttpError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, reason: str, retry_after: str) -> None:
        super().__init__(printable(f"HTTP {status} {reason[:LONGEST]}".strip()))
        self.status = status
        self.retry_after = float(retry_after) if re.fullmatch(r"\d{1,6}", retry_after) else 0.0


class LocalDiskError(OSError):
    """The file on this machine cannot be written: no fault of the source's."""


@dataclass
class FileRetry:
    """Attempts at one file.

    Args:
        what: how messages call it.
        seconds: it is given up when it brought nothing new for so long.
        since: when that time began (`time.monotonic`); by default with the first attempt.
        check: what a user is told to look at.
    """

    what: str
    seconds: float
    since: float | None = None
    check: str = "the network and the server"
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
            LocalDiskError: it cannot be written here.
            ValueError: it cannot be had.
        """
        self.since = time.monotonic() if self.since is None else self.since
        while True:
            self.tries += 1
            try:
                return attempt()
            except (FileNotFoundError, LocalDiskError):
                raise
            except Exception as error:  # the filesystems of many makers have errors of their own
                if http_status(error) in (404, 410):
                    raise FileNotFoundError(one_line(error, LONGEST)) from error
                self._wait(error)
            between()

    def _wait(self, error: Exception) -> None:
        if isinstance(error, ContentMismatch):
            self.mismatches += 1
            if self.mismatches == MISMATCHES:
                raise ValueError(
                    f"{self.what}: {one_line(error, LONGEST)}, {MISMATCHES} downloads in a row. "
                    f"It was changed or damaged: upload it again, "
                    f"or index the folder again."
                ) from error
        elif not is_transient(error):
            raise ValueError(f"{self.what} cannot be read: {one_line(error, LONGEST)}. Check the URL and your rights.") from error
        assert self.since is not None, "an attempt was made"
        left = self.since + self.seconds - time.monotonic()
        if left <= 0:
            raise ValueError(
                f"{self.what} cannot be read: nothing new in {self.seconds:g} s, {self.tries} attempts, "
                f"the last: {one_line(error, LONGEST)}. Check {self.check}, or raise data.retry_seconds."
            ) from error
        pause = min(LONGEST_PAUSE, min(FIRST_PAUSE, self.seconds / 60) * 2**self.failures) * random.uniform(0.5, 1)
        pause = min(left, max(pause, getattr(error, "retry_after", 0.0)))
        self.failures += 1
        warn_limited(f"{self.what}: {one_line(error, LONGEST)}; trying again in {pause:.1f} s, giving up in {left:.0f} s")
        time.sleep(pause)


class DiskRetry:
    """Waits for disks that stall, each known by a number: what fails on them is tried again, as a remote source is."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}
        """When each failed first that was not read again since."""

    def read(self, attempt: Callable[[], T], disk: int, what: str, seconds: float) -> T:
        """Return what an attempt gives, tried again while it ends in one of STALLS.

        Args:
            attempt: at a file.
            disk: that it lies on. It is waited for so many seconds since it failed first; what is asked of it behind that fails at once.
            what: how messages call the file.
            seconds: of patience.

        Raises:
            ValueError: it stalled for too long.
            ValueError, OSError: as the attempt, for whatever is no stall.
        """
        try:
            return attempt()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRNOS:
                raise
        now = time.monotonic()
        since = self._since.get(disk, -math.inf)
        if now > since + REMEMBERED * seconds:
            since = self._since[disk] = now
        found, ended = list[T](), list[Exception]()

        def again() -> None:
            try:
                found.append(attempt())
            except (ValueError, OSError) as error:
                if getattr(error, "errno", None) in TRANSIENT_ERRNOS:
                    raise
                ended.append(error)

        FileRetry(what, seconds, since, "its disk or mount")(again, lambda: None)
        if ended:
            raise ended[0]
        self._since.pop(disk, None)
        return found[0]


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    status = http_status(error)
    if status:
        return status >= 500 or status in TRANSIENT_STATUSES
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


def http_status(error: BaseException) -> int:
    """The HTTP status behind an error, wherever its library keeps it; 0 where there is none."""
    for holder, name in ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")):
        found = str(getattr(holder, name, ""))
        if found.isdigit() and 400 <= int(found) < 600:
            return int(found)
    return 0


_lock = threading.Lock()
_said_at, _unsaid = -1e9, 0


def warn_limited(text: str) -> None:
    """A line on stderr, at most one a second: a broken network breaks every download at once."""
    global _said_at, _unsaid
    with _lock:
        if time.monotonic() < _said_at + 1 / LINES_A_SECOND:
            _unsaid += 1
            return
        more = f" ({_unsaid} more like it)" if _unsaid else ""
        _said_at, _unsaid = time.monotonic(), 0
    print(f"{printable(redact(text))}{more}", file=sys.stderr, flush=True)
