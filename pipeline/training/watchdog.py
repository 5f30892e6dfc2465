"""A run that hangs ends, and says which rank stood where.

A thread of each process tells the others through the launch's store where its
main thread stands. Where that has not moved for too long, the first to notice
asks after all, says which ranks are silent or furthest behind, and every
process ends with status HUNG, so that the launcher starts the run again or
gives its machines back. A process that was stopped (SIGSTOP) or whose machine
is gone is named by the others.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.distributed import Store

from condot.core.printable import say
from condot.core.process import EXIT_HUNG

from ..launch.distributed import rendezvous_info
from .status import Status

T = TypeVar("T")
MAX_RANKS_SHOWN = 8
"""Ranks that a report names; they show their stacks too."""


@dataclass(frozen=True)
class RankPosition:
    """Of a rank's main thread, as it reported last."""

    rank: int
    host: str
    step: int
    activity: str
    moves: int
    """How often it moved in that step: of two ranks in one step the one that moved less is behind."""
    age: float
    """Seconds since it moved."""
    reports: int
    """How often the rank has reported; a number that stands still is a process that does not run."""
    time: float
    """Of the report, Unix seconds by that host's clock."""
    silent: float | None = None
    """Seconds for which nothing was heard of the rank; None where it is heard."""

    def __str__(self) -> str:
        who, activity = f"rank {self.rank} (host {self.host})", f"in step {self.step}, {self.activity}"
        if self.silent is not None:
            return f"{who} has not been heard of for {self.silent:.0f} s; it was {activity}"
        return f"{who} has stood {activity}, for {self.age:.0f} s"


class Watchdog:
    """Ends this process when its main thread stands still for too long.

    Time in which the whole process was stopped, or the machine asleep, does
    not count. Threads of other processes are reached through the store of
    `launch.join`, if that met others.

    Args:
        seconds: without a `heartbeat`; 0 never ends anything and starts no thread.
        status: where `hung` is written.
    """

    def __init__(self, seconds: float, status: Status | None = None) -> None:
        self.seconds = seconds
        self.period = min(10.0, seconds / 10)
        self._status = status
        self._position = (0, "starting")
        self._moves = self._heartbeats = self._last_heartbeats = self._reports_sent = 0
        self._age = 0.0
        self._closed = threading.Event()
        self._rendezvous = rendezvous_info() if seconds else None
        self._rank = self._rendezvous.rank if self._rendezvous else 0
        # two threads: where the network is cut, a store may keep the one that reports waiting for ever
        targets = [self._check_progress] * bool(seconds) + [self._report_position] * (self._rendezvous is not None)
        self._threads = [threading.Thread(target=act, name=act.__name__.strip("_"), daemon=True) for act in targets]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # a thread in the middle of a store's C++ while Python is taken down aborts the process

    def heartbeat(self, step: int, activity: str) -> None:
        """The main thread moved: it is in this step now, doing this ("reading data")."""
        self._moves = self._moves + 1 if step == self._position[0] else 0
        self._position = (step, activity)
        self._heartbeats += 1

    @contextmanager
    def phase(self, activity: str) -> Iterator[None]:
        """The main thread does this for a while, in the step that it is in, then what it did before."""
        step, before = self._position
        self.heartbeat(step, activity)
        try:
            yield
        finally:
            self.heartbeat(step, before)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        atexit.unregister(self.close)
        for thread in self._threads:
            thread.join(timeout=5)

    def _check_progress(self) -> None:
        while True:
            began = time.monotonic()
            if self._closed.wait(self.period):
                return
            if self._seconds_idle(time.monotonic() - began) > self.seconds:
                self._exit_process()

    def _seconds_idle(self, slept: float) -> float:
        """Seconds since the main thread moved; a wait that took far longer than asked was no time of ours."""
        if self._heartbeats != self._last_heartbeats:
            self._last_heartbeats, self._age = self._heartbeats, 0.0
        else:
            self._age += min(slept, 2 * self.period)
        return self._age

    def _report_position(self) -> None:
        """Say to the others where this rank stands, again and again; a store that is gone ends nothing."""
        store: Store | None = None
        while self._rendezvous is not None:
            self._reports_sent += 1
            try:
                store = store or self._rendezvous.client()
                store.set(f"watchdog/{self._rank}", json.dumps(vars(self._own_position())))
            except RuntimeError:
                store = None
            if self._closed.wait(self.period):
                return

    def _own_position(self) -> RankPosition:
        step, activity = self._position
        return RankPosition(self._rank, socket.gethostname(), step, activity, self._moves, self._age, self._reports_sent, time.time())

    def _exit_process(self) -> None:
        """Report and end the process; neither the others nor a disk can keep it from ending."""
        here = self._own_position()
        answer = (
            _with_timeout(3 * self.period + 6, self._ask_all_ranks)
            if self._rendezvous is not None
            else HangReport([str(here)], [self._rank], True)
        )
        if self._closed.is_set() or self._heartbeats != self._last_heartbeats:
            self._age = 0.0  # it moved while we asked
            if isinstance(answer, HangReport) and answer.first:
                _with_timeout(5, self._clear_report)
            return
        if isinstance(answer, str):
            answer = HangReport([str(here), f"the other ranks could not be asked ({answer})"], [self._rank], True)
        _with_timeout(10, lambda: self._print_report(here, answer))
        os._exit(EXIT_HUNG)

    def _print_report(self, here: RankPosition, answer: HangReport) -> None:
        lines = answer.lines if answer.first else [f"{here}; another rank reports on all"]
        say("\n  ".join([f"\nno progress for {self.seconds:g} s (guard.hang_seconds):", *lines]), error=True)
        if self._rank in answer.shown or answer.first:
            faulthandler.dump_traceback(2)
        if self._status is not None and (answer.first or self._status.main):
            self._status.write("hung", step=here.step, reason="; ".join(answer.lines), exit_status=EXIT_HUNG)

    def _ask_all_ranks(self) -> HangReport:
        """What there is to say of all ranks; the first rank that hangs asks them, the others take its answer."""
        assert self._rendezvous is not None
        store, world = self._rendezvous.client(), self._rendezvous.world_size
        if store.add("watchdog/askers", 1) == 1:
            before, interval = _read_positions(store, world), 1.5 * self.period + 1
            self._closed.wait(interval)
            lines, shown = _slowest_ranks(_mark_silent(before, _read_positions(store, world), interval), world)
            store.set("watchdog/report", json.dumps([lines, shown]))
            return HangReport(lines, shown, True)
        while not store.check(["watchdog/report"]):
            self._closed.wait(self.period / 4)
        lines, shown = json.loads(store.get("watchdog/report"))
        return HangReport(lines, shown, False)

    def _clear_report(self) -> None:
        """Let the next hang be asked after anew."""
        assert self._rendezvous is not None
        for key in ("watchdog/askers", "watchdog/report"):
            self._rendezvous.client().delete_key(key)


@dataclass(frozen=True)
class HangReport:
    """What there is to say of the ranks."""

    lines: list[str]
    shown: list[int]
    """The ranks that are named."""
    first: bool
    """This rank found it out and says it for all."""


def _with_timeout(seconds: float, act: Callable[[], T]) -> T | str:
    """What that gives, or why there is nothing after so many seconds."""
    found: list[T | str] = []

    def run() -> None:
        try:
            found.append(act())
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"no answer in {seconds:.0f} s"


def _read_positions(store: Store, world: int) -> dict[int, RankPosition]:
    """Where every rank said that it stands; those that never did are not in it."""
    keys = [f"watchdog/{rank}" for rank in range(world)]
    if store.check(keys):
        reports = dict(enumerate(store.multi_get(keys)))
    else:
        reports = {rank: store.get(key) for rank, key in enumerate(keys) if store.check([key])}
    return {rank: RankPosition(**json.loads(text)) for rank, text in reports.items()}


def _mark_silent(before: dict[int, RankPosition], after: dict[int, RankPosition], interval: float) -> list[RankPosition]:
    """Two readings as one: who did not report anything in between is silent, whatever the clocks of the hosts say."""
    positions = []
    for rank, position in after.items():
        said: dict[str, Any] = dict(vars(position))
        if rank in before and before[rank].reports == position.reports:
            said["silent"] = max(interval, time.time() - position.time)
        positions.append(RankPosition(**said))
    return positions


def _slowest_ranks(positions: list[RankPosition], world: int) -> tuple[list[str], list[int]]:
    """The ranks that most likely hold up the others, a line each, the worst first; and which they are."""
    absent = sorted(set(range(world)) - {position.rank for position in positions})
    positions = sorted(
        positions, key=lambda position: (position.silent is None, position.step, position.moves, -position.age, position.rank)
    )
    lines = [f"rank {rank} was never heard of" for rank in absent[:MAX_RANKS_SHOWN]]
    shown = positions[: MAX_RANKS_SHOWN - len(lines)]
    lines += [str(position) for position in shown]
    if world > len(lines):
        lines.append(f"and {world - len(lines)} more")
    return lines, [*absent[:MAX_RANKS_SHOWN], *(position.rank for position in shown)]
