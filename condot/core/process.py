"""The process itself: how its threads wait, and how it stops.

Import this before anything slow: from then on an interruption prints one line
instead of a traceback, at once while nothing can be lost, after the step while
training. The end of the launcher is an interruption too, so that no rank
outlives it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from .printable import guard_output, one_line

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Each asks for an end: Ctrl-C, a scheduler, SLURM's warning before the time is up, a terminal that went away."""
ORPHANED: int = getattr(signal, "SIGRTMIN", signal.SIGTERM)
"""What Linux sends when the launcher ends: none of SIGNALS, which mean what they say even where the sender lives."""
DONE, MISTAKE, DIVERGED, HUNG, NO_DATA = 0, 2, 3, 4, 5
"""Exit statuses; 128 + n is the signal n."""

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


class DataError(ValueError):
    """What a run learns from cannot be read. Raised between two steps, on all ranks alike, so that the state can be saved."""


def processors() -> int:
    """Return how many processors this process may use: of its affinity, which taskset and SLURM set, where the system has such a thing."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


class Stopper:
    """Remembers that a signal came, or that the launcher ended.

    Until `defer` is called that ends the process. After it, `requested`
    becomes true and the loop is expected to save and return; a second Ctrl-C
    more than a second later ends the process where it stands.

    Args:
        consolation: what an interruption at once leaves the user with.
        listen: take the signals; not in a program that only borrows the module.
    """

    def __init__(self, consolation: str, *, listen: bool = True) -> None:
        self._consolation = consolation
        self.received: int | None = None
        self._deferred = False
        self._since = 0.0
        self._launcher = os.getppid()
        if listen:
            self._listen()

    def _listen(self) -> None:
        for number in SIGNALS:
            kept = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN  # nohup
            if not kept or "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ignores nohup, and passes the signal on before it kills
                signal.signal(number, self._handle)
        if launched() and sys.platform == "linux":
            signal.signal(ORPHANED, self._orphaned)
            _ask_for_orphaned()
            self._orphaned(ORPHANED, None)  # it may have ended before we asked

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

    def _handle(self, number: int, frame: FrameType | None, why: str = "") -> None:
        again = self.requested and number == signal.SIGINT and time.monotonic() - self._since > 1
        if not self._deferred or again:
            _say(f"\ninterrupted{why}: {self._consolation}.\n")
            os._exit(128 + number)
        if not self.requested:
            self.received, self._since = number, time.monotonic()
            _say(f"\nstopping after this step{why}; Ctrl-C again to stop at once.\n")

    def _orphaned(self, number: int, frame: FrameType | None) -> None:
        """Linux sends this when the *thread* that started us ends; the launcher may live on."""
        if os.getppid() != self._launcher:
            self._handle(signal.SIGTERM, frame, " (the launcher ended)")


_PROGRAM: list[Stopper] = []
"""The stopper of the program that this process is, if condot is that program."""


def take_signals(consolation: str) -> None:
    """Take the signals of this process: see `Stopper`. To be called by a main program, before anything slow."""
    _PROGRAM[:] = [Stopper(consolation)]


def stopper_of_program() -> Stopper:
    """Return the stopper of the program, or where condot is only a guest of another, one that hears nothing."""
    return _PROGRAM[0] if _PROGRAM else Stopper("", listen=False)


def _ask_for_orphaned() -> None:
    """PR_SET_PDEATHSIG: outlasts exec, not fork."""
    ctypes.CDLL(None).prctl(1, ctypes.c_ulong(ORPHANED), 0, 0, 0)


def _say(text: str) -> None:
    """To stderr, from a signal handler: Python's own stream may be in the middle of a line, its reader gone, or asleep."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    with contextlib.suppress(OSError):
        if poll.poll(0):
            os.write(2, text.encode())


def reported(act: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Make a command of a function of words to an exit status: what a user can cause becomes one line and status 2, or 5 for data.

    CONDOT_DEBUG=1 shows the traceback instead.
    """

    @functools.wraps(act)
    def main(argv: list[str]) -> int:
        from safetensors import SafetensorError

        guard_output()
        try:
            return act(argv)
        except (ValueError, OSError, SafetensorError) as error:
            if os.environ.get("CONDOT_DEBUG"):
                raise
            text = one_line(error)
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
            remedy = " Free some space and run the same command again." if full else ""
            rank = os.environ.get("RANK", "0")
            where = f" (rank {rank})" if rank != "0" else ""
            print(f"error{where}: {text}{remedy}", file=sys.stderr, flush=True)
            status = NO_DATA if isinstance(error, DataError) else MISTAKE
            leave_group(status)
            return status

    return main


def leave_group(status: int) -> None:
    """End a process of a launch at once, with this status; one that no launcher started goes on.

    Called while the model still lives. Its destructor would end gloo's
    communication and may wait for ever, holding Python's lock, for a thread of
    gloo that waits for that lock (torch 2.13; seen once in some thirty runs);
    and at the end of Python a group of one process, too, may still have a
    thread, at which the C++ library aborts (5 of 24 runs of torchrun).
    """
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
