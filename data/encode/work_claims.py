"""Who works on what, without a word between the workers: a file created exclusively is the right to one piece of work.

Any number of processes on any number of machines may share a folder of claims.
A claim whose process has died, or that nobody has touched for long, is taken
over by the next who asks.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from pathlib import Path
from types import TracebackType

from condot.core.file_lock import lock_alone, open_lock, open_regular

LONGEST = 10_000
"""Characters of a claim that are read."""
STALE_SECONDS = 600.0
"""A claim that was not touched for so long belongs to nobody, whatever machine its process was on."""


def _pid_space() -> str:
    """This machine as far as process numbers go: containers may share a host's name and not its numbers."""
    try:
        return f"{socket.gethostname()}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_start(pid: int) -> str:
    """When a process began, so that a number used again is not taken for it; empty where that cannot be known."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if words[0] in "ZX" else words[19]  # a zombie works no more
    except (OSError, IndexError):
        return ""


class Claim:
    """The right to one piece of work, given back at the end of a `with`."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text, self._touched = path, text, time.monotonic()

    @property
    def is_held(self) -> bool:
        """Whether it is still ours: a worker that slept for long may have lost it."""
        try:
            return _read(self._path) == self._text
        except (OSError, ValueError):
            return False

    def touch(self, every: float = 5.0) -> None:
        """Say that the work goes on; call it often."""
        if time.monotonic() - self._touched >= every:
            self._touched = time.monotonic()
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._path)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.is_held:
            self._path.unlink(missing_ok=True)


def claim_work(path: Path, stale_seconds: float = STALE_SECONDS) -> Claim | None:
    """Claim what `path` stands for, or None where another works on it."""
    claim = _create(path)
    if claim is not None or not _is_abandoned(path, stale_seconds):
        return claim
    lock = open_lock(path.with_name("takeover.lock"))  # two that see the same dead claim must not both take it
    try:
        lock_alone(lock)
        if _is_abandoned(path, stale_seconds):
            path.unlink(missing_ok=True)
    finally:
        os.close(lock)
    return _create(path)


def _read(path: Path) -> str:
    """Raises ValueError where something else than a file stands there, OSError as `open`."""
    with os.fdopen(open_regular(path, os.O_RDONLY)) as file:
        return file.read(LONGEST)


def _create(path: Path) -> Claim | None:
    """Write a claim beside its place and link it there: the link is exclusive, and the claim is never seen half-written."""
    facts = {
        "host": _pid_space(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
        "time": time.time(),
        "nonce": secrets.token_hex(8),
    }
    text, temporary = json.dumps(facts), path.with_name(f".{path.name}.{facts['nonce']}")
    temporary.write_text(text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return None
    finally:
        temporary.unlink()
    return Claim(path, text)


def _is_abandoned(path: Path, stale_seconds: float) -> bool:
    """Whether the process that holds a claim is dead, or has not touched it for long."""
    try:
        text, touched = _read(path), path.stat().st_mtime
    except FileNotFoundError:
        return True
    try:
        facts = json.loads(text)
        here = facts["host"] == _pid_space() and _process_start(os.getpid()) != ""
        dead = here and _process_start(facts["pid"]) != facts["started"]
    except (ValueError, KeyError, TypeError):
        return True  # nobody's: claims are never seen half-written
    return time.time() - touched > stale_seconds or dead
