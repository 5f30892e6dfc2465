"""A run that hangs ends, and says which rank stood where.

A thread of each process tells the others through the launch's store where its
main thread stands. Where that has not moved for too long, the first to notice
asks after all, says which ranks are silent or furthest behind, and every
process ends with status HUNG, so that the launcher starts the run again or
gives its machines back. A process that was stopped (SIGSTOP) or whose machine
is gone is named by the others.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.distributed import Store

from .launch import meeting
from .process import HUNG
from .status import Status

SHOWN = 8
"""Ranks that a report names; they show their stacks too."""


@dataclass(frozen=True)
class Place:
    """Of a rank's main thread, as it told last."""

    rank: int
    host: str
    step: int
    where: str
    moves: int
    """How often it moved in that step: of two ranks in one step the one that moved less is behind."""
    age: float
    """Seconds since it moved."""
    told: int
    """How often the rank has told; a number that stands still is a process that does not run."""
    time: float
    """Of the telling, Unix seconds by that host's clock."""
    silent: float | None = None
    """Seconds for which nothing was heard of the rank; None where it is heard."""

    def __str__(self) -> str:
        who, where = f"rank {self.rank} (host {self.host})", f"in step {self.step}, {self.where}"
        if self.silent is not None:
            return f"{who} has not been heard of for {self.silent:.0f} s; it was {where}"
        return f"{who} has stood {where}, for {self.age:.0f} s"


class Watch:
    """Ends this process when its main thread stands still for too long.

    Time in which the whole process was stopped, or the machine asleep, does
    not count. Threads of other processes are reached through the store of
    `launch.join`, if that met others.

    Args:
        seconds: without a `beat`; 0 never ends anything and starts no thread.
        status: where `hung` is written.
    """

    def __init__(self, seconds: float, status: Status | None = None) -> None:
        self.seconds = seconds
        self.period = min(10.0, seconds / 10)
        self._status = status
        self._place = (0, "starting")
        self._moves = self._beats = self._seen = self._told = 0
        self._age = 0.0
        self._ended = threading.Event()
        self._met = meeting() if seconds else None
        self._rank = self._met.rank if self._met else 0
        self._store: Store | None = None
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        if seconds:
            self._thread.start()

    def beat(self, step: int, where: str) -> None:
        """The main thread moved: it is in this step now, doing this ("reading data")."""
        self._moves = self._moves + 1 if step == self._place[0] else 0
        self._place = (step, where)
        self._beats += 1

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """The main thread does this for a while, in the step that it is in, then what it did before."""
        step, before = self._place
        self.beat(step, where)
        try:
            yield
        finally:
            self.beat(step, before)

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _watch(self) -> None:
        while True:
            self._tell()
            began = time.monotonic()
            if self._ended.wait(self.period):
                return
            if self._count(time.monotonic() - began) > self.seconds:
                self._end()

    def _count(self, slept: float) -> float:
        """Seconds since the main thread moved; a wait that took far longer than asked was no time of ours."""
        if self._beats != self._seen:
            self._seen, self._age = self._beats, 0.0
        else:
            self._age += min(slept, 2 * self.period)
        return self._age

    def _tell(self) -> None:
        """Say to the others where this rank stands; a store that is gone ends nothing."""
        self._told += 1
        if self._met is None:
            return
        try:
            self._store = self._store or self._met.client()
            self._store.set(f"watch/{self._rank}", json.dumps(vars(self._here())))
        except RuntimeError:
            self._store = None  # its host ended, or will be asked again

    def _here(self) -> Place:
        step, where = self._place
        return Place(self._rank, socket.gethostname(), step, where, self._moves, self._age, self._told, time.time())

    def _end(self) -> None:
        """Report and end the process; only the thread comes here."""
        here = self._here()
        report, shown, teller = [str(here)], [self._rank], True
        try:
            if self._met is not None and self._store is not None:
                report, shown, teller = self._ask(self._store, self._met.world)
        except RuntimeError as error:
            report.append(f"the other ranks could not be asked ({str(error).splitlines()[0]})")
        if self._ended.is_set() or self._beats != self._seen:
            self._age = 0.0  # it moved while we asked
            if teller and self._store is not None:
                for key in ("watch/askers", "watch/report"):
                    self._store.delete_key(key)
            return
        lines = report if teller else [f"{here}; another rank reports on all"]
        print("\n  ".join([f"\nno progress for {self.seconds:g} s (guard.hang_seconds):", *lines]), file=sys.stderr, flush=True)
        if self._rank in shown or teller:
            faulthandler.dump_traceback(2)
        if self._status is not None and (teller or self._status.main):
            self._status.write("hung", step=here.step, reason="; ".join(report), exit_status=HUNG)
        os._exit(HUNG)

    def _ask(self, store: Store, world: int) -> tuple[list[str], list[int], bool]:
        """What to say of the ranks, line by line, which ranks it names, and whether this rank found it out; only one asks them all."""
        if store.add("watch/askers", 1) == 1:
            before, apart = _places(store, world), 1.5 * self.period + 1
            self._ended.wait(apart)
            self._tell()
            places = _compare(before, _places(store, world), apart)
            report, shown = _report(places, world)
            store.set("watch/report", json.dumps([report, shown]))
            return report, shown, True
        deadline = time.monotonic() + 3 * self.period + 15
        while not store.check(["watch/report"]):
            if time.monotonic() > deadline:
                raise RuntimeError("the rank that asked did not answer")
            self._ended.wait(self.period / 4)
            self._tell()  # who asks hears that this process runs
        report, shown = json.loads(store.get("watch/report"))
        return report, shown, False


def _places(store: Store, world: int) -> dict[int, Place]:
    """Where every rank said that it stands; those that never did are not in it."""
    keys = [f"watch/{rank}" for rank in range(world)]
    if store.check(keys):
        told = dict(enumerate(store.multi_get(keys)))
    else:
        told = {rank: store.get(key) for rank, key in enumerate(keys) if store.check([key])}
    return {rank: Place(**json.loads(text)) for rank, text in told.items()}


def _compare(before: dict[int, Place], after: dict[int, Place], apart: float) -> list[Place]:
    """Two readings as one: who did not tell anything in between is silent, whatever the clocks of the hosts say."""
    places = []
    for rank, place in after.items():
        said: dict[str, Any] = dict(vars(place))
        if rank in before and before[rank].told == place.told:
            said["silent"] = max(apart, time.time() - place.time)
        places.append(Place(**said))
    return places


def _report(places: list[Place], world: int) -> tuple[list[str], list[int]]:
    """The ranks that most likely hold up the others, a line each, the worst first; and which they are."""
    absent = sorted(set(range(world)) - {place.rank for place in places})
    places = sorted(places, key=lambda place: (place.silent is None, place.step, place.moves, -place.age, place.rank))
    lines = [f"rank {rank} was never heard of" for rank in absent[:SHOWN]]
    shown = places[: SHOWN - len(lines)]
    lines += [str(place) for place in shown]
    if world > len(lines):
        lines.append(f"and {world - len(lines)} more")
    return lines, [*absent[:SHOWN], *(place.rank for place in shown)]
