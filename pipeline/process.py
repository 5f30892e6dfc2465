"""The process itself: how its threads wait, and how it stops.

Import this before anything slow: from then on an interruption prints one line
instead of a traceback, at once while nothing can be lost, after the step while
training.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Read by the threads of torch when it is imported. By default they spin for each other for milliseconds, which on a machine that others
# use too made a step of two threads on two cores 4 to 8 times slower (2.0 s against 0.25 to 0.6 s); docs/failed-ideas.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Memory that was freed is kept, in huge pages: a step of training frees and takes the same gigabytes again and again, and giving them back
# in between cost a fifth of it (benchmarks/train_step.py). glibc reads these when a process starts.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
DRIVERS = ("/dev/nvidiactl", "/dev/kfd")
"""Of GPUs: memory of the host matters less there."""


def own_allocator() -> None:
    """Start this same command again with ALLOCATOR set, in the same process; to be called before anything slow, by a main program only.

    Not where one of the variables is set already, by the user or by this
    function, nor where there is a GPU, another C library than glibc, or
    CONDOT_ALLOCATOR=system.
    """
    glibc = platform.libc_ver()[0] == "glibc"
    wanted = os.environ.get("CONDOT_ALLOCATOR") != "system" and not any(map(os.path.exists, DRIVERS))
    if glibc and wanted and sys.executable and not ALLOCATOR.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


class Stopper:
    """Remembers that a signal came.

    Until `defer` is called a signal ends the process. After it, `requested`
    becomes true and the loop is expected to save and return; a second Ctrl-C
    more than a second later ends the process where it stands.

    Args:
        consolation: what an interruption at once leaves the user with.
    """

    def __init__(self, consolation: str) -> None:
        self._consolation = consolation
        self.received: int | None = None
        self._deferred = False
        self._since = 0.0
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        """A signal came."""
        return self.received is not None

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells have it; 0 without one."""
        return 128 + self.received if self.received else 0

    def defer(self) -> None:
        """From now on the loop looks at `requested`."""
        self._deferred = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.requested and number == signal.SIGINT and time.monotonic() - self._since > 1
        if not self._deferred or again:
            sys.stderr.write(f"\ninterrupted: {self._consolation}.\n")
            sys.stderr.flush()
            os._exit(128 + number)
        if not self.requested:
            self.received, self._since = number, time.monotonic()
            sys.stderr.write("\nstopping after this step; Ctrl-C again to stop at once.\n")


def reported(act: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Make a command of a function of words to an exit status: what a user can cause becomes one line and status 2.

    CONDOT_DEBUG=1 shows the traceback instead.
    """

    @functools.wraps(act)
    def main(argv: list[str]) -> int:
        from safetensors import SafetensorError

        try:
            return act(argv)
        except (ValueError, OSError, SafetensorError) as error:
            if os.environ.get("CONDOT_DEBUG"):
                raise
            text = " ".join(str(error).split())
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
            remedy = " Free some space and run the same command again." if full else ""
            rank = os.environ.get("RANK", "0")
            where = f" (rank {rank})" if rank != "0" else ""
            print(f"error{where}: {text}{remedy}", file=sys.stderr, flush=True)
            leave_group(2)
            return 2

    return main


def leave_group(status: int) -> None:
    """End a process of several at once, with this status; a process alone goes on.

    Called while the model still lives: its destructor would end gloo's
    communication and may wait for ever, holding Python's lock, for a thread
    of gloo that waits for that lock (torch 2.13; seen once in some thirty runs).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
