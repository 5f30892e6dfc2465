"""Trackers of Accelerate, each on a thread of its own: a server that is gone, raises or hangs neither stops nor slows training."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from condot.core.printable import one_line, redact
from condot.core.registry import UnknownKindError

from .tracker_kinds import FINISH_TIMEOUT, TRACKERS, TrackedRun

MAX_QUEUED = 1000
"""Calls that may wait for a tracker; further ones are left out and counted."""
SLOW_CALL_SECONDS = 60.0
"""Seconds after which a call that has not returned is spoken of."""
STUCK_TRACKERS: list[str] = []
"""Trackers that did not end in time; see `exit_process`."""


def check_installed(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed.

    Args:
        names: `log.report_to`.

    Raises:
        ValueError: a package is missing.
    """
    for name in names:
        if name == "none":
            continue
        try:
            package = TRACKERS.lookup(name).package
            if package:
                importlib.metadata.version(package)
        except UnknownKindError as error:
            raise UnknownKindError(f"log.report_to={name}: {error}") from None
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"log.report_to={name}: the package is not installed. Run `pip install {package}`, or leave it out.") from None


class BackgroundTracker(GeneralTracker):  # type: ignore[misc]
    """A tracker that is never waited for: every call is put down, and made by a thread.

    Args:
        name: as in `log.report_to`.
        make: the tracker itself, not yet started; called on the thread.
    """

    main_process_only = True
    requires_logging_directory = False

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        super().__init__(_blank=True)
        self.name, self._make = name, make
        self._inner: Any = None
        self._calls: deque[tuple[str, Callable[[], Any]]] = deque()
        self._lock = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._messages: list[str] = []
        self._reported: set[str] = set()
        self._busy: tuple[str, float] | None = None
        self._ending = False
        self.submitted = self.lost = 0
        """Lines of metrics: all, and those that it did not take."""

    @property
    def tracker(self) -> Any:
        """What the package gave, once it is there."""
        return getattr(self._inner, "tracker", None)

    def start(self) -> None:
        """Begin; nothing is waited for."""
        self._enqueue("start", self._start_inner)
        self._thread.start()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Give the settings of the run."""
        self._enqueue("settings", lambda: self._inner.store_init_configuration(values))

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        """Give a line of metrics, or count it as lost."""
        self.submitted += 1
        self._enqueue("line", lambda: self._inner.log(values, step=step, **more))
        busy = self._busy
        if busy and time.monotonic() - busy[1] > SLOW_CALL_SECONDS:
            self._report_once("slow", f"has not answered for {SLOW_CALL_SECONDS:.0f} s")

    def rewind(self, step: int) -> None:
        """Steps after this one are done again; a tracker that cannot forget them shows them twice."""
        self._enqueue("way back", lambda: getattr(self._inner, "rewind", lambda step: None)(step))

    def request_stop(self) -> None:
        """No further calls come."""
        with self._lock:
            self._ending = True
            self._lock.notify()

    def finish(self, timeout: float = FINISH_TIMEOUT) -> None:
        """Wait for what was given, so many seconds at most, and end."""
        self.request_stop()
        if not self._thread.is_alive() or self.name in STUCK_TRACKERS:
            return
        self._thread.join(max(timeout, 0.0))
        if not self._thread.is_alive():
            return
        STUCK_TRACKERS.append(self.name)
        with self._lock:
            undone = [*self._calls, self._busy or ("", 0.0)]
            self.lost += sum(kind == "line" for kind, _ in undone)
            self._calls.clear()
        self._report_once("end", f"did not end within {FINISH_TIMEOUT:.0f} s, and is left")

    def take_messages(self) -> list[str]:
        """What is to be said since the last call."""
        with self._lock:
            found, self._messages = self._messages, []
        return found

    def loss_summary(self) -> str:
        """At the end: what it missed, or ""."""
        return f"log.report_to={self.name} missed {self.lost} of {self.submitted} lines; metrics.jsonl has them." if self.lost else ""

    def _report_once(self, what: str, text: str) -> None:
        """Report a tracker's failure, once."""
        with self._lock:
            if what not in self._reported:
                self._reported.add(what)
                after = "" if what == "end" else ": training goes on, and metrics.jsonl has every line"
                self._messages.append(f"log.report_to={self.name} {text}{after}.")

    def _enqueue(self, kind: str, call: Callable[[], Any]) -> None:
        with self._lock:
            has_room = len(self._calls) < MAX_QUEUED
            if has_room:
                self._calls.append((kind, call))
                self._lock.notify()
            else:
                self.lost += kind == "line"
        if not has_room:
            self._report_once("behind", f"is {MAX_QUEUED} lines behind, and further ones are left out")

    def _count_lost(self, kind: str) -> None:
        with self._lock:
            self.lost += kind == "line"

    def _start_inner(self) -> None:
        inner = self._make()
        inner.start()
        self._inner = inner

    def _next_call(self) -> tuple[str, Callable[[], Any]]:
        with self._lock:
            while not self._calls and not self._ending:
                self._lock.wait()
            return self._calls.popleft() if self._calls else ("end", lambda: self._inner.finish())

    def _run(self) -> None:
        """The thread: one call after the other, in their order, then the end."""
        kind = ""
        while kind != "end":
            kind, call = self._next_call()
            self._busy = (kind, time.monotonic())
            try:
                if self._inner is not None or kind == "start":
                    call()
                else:
                    self._count_lost(kind)
            except (Exception, SystemExit) as error:  # whatever a package raises
                self._count_lost(kind)
                self._report_once(
                    "off" if kind == "start" else "raised", f"{'did not start' if kind == 'start' else 'failed'} ({_short_error(error)})"
                )
            self._busy = None


def _short_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)[:200]}"


def attach_trackers(
    accelerator: Accelerator, names: Sequence[str], project: str, folder: Path, settings: Mapping[str, Any], start: int
) -> None:
    """Give an Accelerator its trackers: `accelerator.log` reaches them, on the main process.

    Args:
        accelerator: of the run.
        names: `log.report_to`.
        project: what wandb and trackio file the run under.
        folder: of the run, whose name is the run's.
        settings: nested plain values.
        start: the step that the run goes on from; 0 is a new run to the trackers.
    """
    flat_settings = flatten_settings(settings)
    run = TrackedRun(project, folder, start, flat_settings)
    kinds = {name: TRACKERS.lookup(name) for name in dict.fromkeys(names) if name != "none"}
    if any(kind.keeps_command for kind in kinds.values()):
        sys.argv[1:] = map(redact, sys.argv[1:])
    wanted = kinds if accelerator.is_main_process else {}
    accelerator.log_with = [BackgroundTracker(name, partial(kind.build, run)) for name, kind in wanted.items()]
    accelerator.init_trackers(project)
    for one in accelerator.trackers:
        if kinds[one.name].stores_settings and start == 0:  # each time TensorBoard makes files of its own
            one.store_init_configuration(flat_settings)


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings by dotted names; lists as their words, nothing as `none`, which all trackers hold."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flatten_settings(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            found[f"{prefix}{name}"] = " ".join(map(str, value))
        else:
            found[f"{prefix}{name}"] = "none" if value is None else value
    return found


def finish_trackers(trackers: Sequence[Any], timeout: float = FINISH_TIMEOUT) -> list[str]:
    """End all trackers within `timeout` seconds together; what is to be said."""
    ours = [tracker for tracker in trackers if isinstance(tracker, BackgroundTracker)]
    deadline = time.monotonic() + timeout
    for tracker in ours:
        tracker.request_stop()
    for tracker in ours:
        tracker.finish(deadline - time.monotonic())
    return [text for tracker in ours for text in (*tracker.take_messages(), tracker.loss_summary()) if text]


def exit_process(status: int) -> NoReturn:
    """End the process; at once where a tracker is stuck, since its package may wait for its server once more."""
    if STUCK_TRACKERS:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
