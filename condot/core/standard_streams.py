"""Standard output and error that outlive whoever reads them: what cannot be written is lost, counted and told once, and raises nothing."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import time

PATIENCE = 10.0
"""Seconds that a pipe or a terminal which nobody reads is waited for; from then on its text is lost until it is read again."""
TEXTS = {1: "standard output", 2: "standard error"}


def guard_streams() -> None:
    """Let nothing that is printed raise: by `print`, a bar, a warning, a handler of logging, or Python when it ends.

    To be called by a main program before its slow imports: whoever keeps
    `sys.stderr` then keeps the guarded one. Where a stream was closed by the
    shell (`2>&-`), its number goes to /dev/null, or else to the next file that
    is opened, which would get what is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
    raws = {number: StandardStream(number) for number in TEXTS}
    raws[1].other, raws[2].other = raws[2], raws[1]
    sys.stdout = sys.__stdout__ = _text(sys.stdout, raws[1])  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(sys.stderr, raws[2])  # type: ignore[misc]


def _text(plain: object, raw: StandardStream) -> io.TextIOWrapper:
    """Return a text stream over `raw` as the plain one was, but that it escapes what its encoding lacks."""
    at_once, encoding, errors, by_line = False, "utf-8", "backslashreplace", raw.isatty() or raw.fileno() == 2
    if isinstance(plain, io.TextIOWrapper):
        at_once, encoding, by_line = plain.write_through, plain.encoding, plain.line_buffering
        errors = plain.errors if plain.errors not in (None, "strict", "surrogateescape") else errors
        with contextlib.suppress(OSError, ValueError):
            plain.flush()
    whole = raw if at_once else io.BufferedWriter(raw)
    return StandardText(whole, encoding, errors, line_buffering=by_line, write_through=at_once)


class StandardText(io.TextIOWrapper):
    """Text that cannot be closed: a library that closes it would end whoever prints next."""

    def close(self) -> None:
        self.flush()


class StandardStream(io.FileIO):
    """The bytes: all of them are taken, whatever becomes of them.

    A disk that is full, a reader that is gone, a terminal that was closed are
    tried again with each text, since they may come back; a pipe that is full is
    waited for, PATIENCE seconds since it last took something.

    Args:
        number: of the open file, 1 or 2, which stays open.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.other: StandardStream | None = None
        """Where a loss is told, if that can be written."""
        self.lost = 0
        """Bytes that are not told of yet."""
        self._stuck = self._told = False

    def write(self, data: object) -> int:
        """Write, or count as lost; never raises OSError."""
        body = bytes(data)  # type: ignore[call-overload]
        news = f"\n[{self.lost} bytes of output are missing here: they could not be written]\n".encode() if self.lost else b""
        left, reason = self._send(news + body)
        self.lost = self.lost + min(left, len(body)) if reason else 0
        if reason and not self._told:
            self._told = True
            self._tell(reason)
        return len(body)

    def _tell(self, reason: str) -> None:
        """Say on the other stream that this one is lost, unless both lead to one place."""
        try:
            one = self.other is None or self.other.lost or os.path.sameopenfile(self.fileno(), self.other.fileno())
        except OSError:
            return
        if not one and self.other is not None:
            self.other.write(f"{TEXTS[self.fileno()]} cannot be written ({reason}): its text is lost, and the work goes on.\n".encode())

    def _send(self, body: bytes) -> tuple[int, str]:
        """Return how many bytes were not written, and why."""
        until, left = time.monotonic() + (0.0 if self._stuck else PATIENCE), memoryview(body)
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        while left:
            self._stuck = not poll.poll(max(0.0, 1000 * (until - time.monotonic())))
            if self._stuck:
                return len(left), "nobody reads it"
            try:
                left = left[os.write(self.fileno(), left[: select.PIPE_BUF]) :]  # so much never waits where poll found room
            except OSError as error:
                return len(left), error.strerror or "it failed"
            until = time.monotonic() + PATIENCE
        return 0, ""
