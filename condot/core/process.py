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
PARENT_DEATH_SIGNAL: int = getattr(signal, "SIGRTMIN", signal.SIGTERM)
"""What Linux sends when the launcher ends: none of SIGNALS, which mean what they say even where the sender lives."""
EXIT_OK, EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_HUNG, EXIT_DATA_ERROR = 0, 2, 3, 4, 5
"""Exit statuses; 128 + n is the signal n."""

# Read by the threads of torch when it is imported. By default they spin for each other for milliseconds, which on a machine that others
# use too made a step of two threads on two cores 4 to 8 times slower (2.0 s against 0.25 to 0.6 s); docs/failed-ideas.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Memory that was freed is kept, in huge pages: a step of training frees and takes the same gigabytes again and again, and giving them back
# in between cost a fifth of it (benchmarks/train_step.py). glibc reads these when a process starts.
ALLOCATOR_ENV = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd")
"""Of GPUs: memory of the host matters less there."""


def restart_with_allocator() -> None:
    """Start this same command again with ALLOCATOR_ENV set, in the same process; to be called before anything slow, by a main program only.

    Not where one of the variables is set already, by the user or by this
    function, nor where there is a GPU, another C library than glibc, or
    CONDOT_ALLOCATOR=system.
    """
    glibc = platform.libc_ver()[0] == "glibc"
    wanted = os.environ.get("CONDOT_ALLOCATOR") != "system" and not any(map(os.path.exists, GPU_DEVICE_FILES))
    if glibc and wanted and sys.executable and not ALLOCATOR_ENV.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR_ENV})


class DataError(ValueError):
    """What a run learns from cannot be read. Raised between two steps, on all ranks alike, so that the state can be saved."""


def available_cpus() -> int:
    """Return how many processors this process may use: of its affinity, which taskset and SLURM set, where the system has such a thing."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


class InterruptHandler:
    """Remembers that a signal came, or that the launcher ended.

    Until `defer` is called that ends the process. After it, `requested`
    becomes true and the loop is expected to save and return; a second Ctrl-C
    more than a second later ends the process where it stands.

    Args:
        message: what an interruption at once leaves the user with.
        install: take the signals; not in a program that only borrows the module.
    """

    def __init__(self, message: str, *, install: bool = True) -> None:
        self._message = message
        self.received: int | None = None
        self._deferred = False
        self._received_at = 0.0
        self._parent_pid = os.getppid()
        if install:
            self._install()

    def _install(self) -> None:
        for number in SIGNALS:
            nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN  # nohup
            if not nohup or "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ignores nohup, and passes the signal on before it kills
                signal.signal(number, self._handle)
        if is_launched() and sys.platform == "linux":
            signal.signal(PARENT_DEATH_SIGNAL, self._on_parent_death)
            _request_parent_death_signal()
            self._on_parent_death(PARENT_DEATH_SIGNAL, None)  # it may have ended before we asked

    @property
    def requested(self) -> bool:
        """Return whether a signal came."""
        return self.received is not None

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells have it; 0 without one."""
        return 128 + self.received if self.received else 0

    def defer(self) -> None:
        """From now on the loop looks at `requested`."""
        self._deferred = True

    def _handle(self, number: int, frame: FrameType | None, why: str = "") -> None:
        second_interrupt = self.requested and number == signal.SIGINT and time.monotonic() - self._received_at > 1
        if not self._deferred or second_interrupt:
            _write_stderr(f"\ninterrupted{why}: {self._message}.\n")
            os._exit(128 + number)
        if not self.requested:
            self.received, self._received_at = number, time.monotonic()
            _write_stderr(f"\nstopping after this step{why}; Ctrl-C again to stop at once.\n")

    def _on_parent_death(self, number: int, frame: FrameType | None) -> None:
        """Linux sends this when the *thread* that started us ends; the launcher may live on."""
        if os.getppid() != self._parent_pid:
            self._handle(signal.SIGTERM, frame, " (the launcher ended)")


_PROGRAM: list[InterruptHandler] = []
"""The stopper of the program that this process is, if condot is that program."""


def take_signals(message: str) -> None:
    """Take the signals of this process: see `InterruptHandler`. To be called by a main program, before anything slow."""
    _PROGRAM[:] = [InterruptHandler(message)]


def stopper_of_program() -> InterruptHandler:
    """Return the stopper of the program, or where condot is only a guest of another, one that hears nothing."""
    return _PROGRAM[0] if _PROGRAM else InterruptHandler("", install=False)


def _request_parent_death_signal() -> None:
    """PR_SET_PDEATHSIG: outlasts exec, not fork."""
    ctypes.CDLL(None).prctl(1, ctypes.c_ulong(PARENT_DEATH_SIGNAL), 0, 0, 0)


def _write_stderr(text: str) -> None:
    """To stderr, from a signal handler: Python's own stream may be in the middle of a line, its reader gone, or asleep."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    with contextlib.suppress(OSError):
        if poll.poll(0):
            os.write(2, text.encode())


def report_errors(command: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Make a command of a function of words to an exit status: what a user can cause becomes one line and status 2, or 5 for data.

    CONDOT_DEBUG=1 shows the traceback instead.
    """

    @functools.wraps(command)
    def main(argv: list[str]) -> int:
        from safetensors import SafetensorError

        guard_output()
        try:
            return command(argv)
        except (ValueError, OSError, SafetensorError) as error:
            if os.environ.get("CONDOT_DEBUG"):
                raise
            text = one_line(error)
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
            remedy = " Free some space and run the same command again." if full else ""
            rank = os.environ.get("RANK", "0")
            where = f" (rank {rank})" if rank != "0" else ""
            print(f"error{where}: {text}{remedy}", file=sys.stderr, flush=True)
            status = EXIT_DATA_ERROR if isinstance(error, DataError) else EXIT_USER_ERROR
            exit_if_distributed(status)
            return status

    return main


def exit_if_distributed(status: int) -> None:
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
