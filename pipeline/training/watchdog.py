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
from condot.core.process import HUNG

from ..launch.distributed import met
from .status import Status

T = TypeVar("T")
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
        self._met = met() if seconds else None
        self._rank = self._met.rank if self._met else 0
        # two threads: where the network is cut, a store may keep the one that tells waiting for ever
        acts = [self._watch] * bool(seconds) + [self._tell] * (self._met is not None)
        self._threads = [threading.Thread(target=act, name=act.__name__.strip("_"), daemon=True) for act in acts]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # a thread in the middle of a store's C++ while Python is taken down aborts the process

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
        atexit.unregister(self.close)
        for thread in self._threads:
            thread.join(timeout=5)

    def _watch(self) -> None:
        while True:
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
        """Say to the others where this rank stands, again and again; a store that is gone ends nothing."""
        store: Store | None = None
        while self._met is not None:
            self._told += 1
            try:
                store = store or self._met.client()
                store.set(f"watch/{self._rank}", json.dumps(vars(self._here())))
            except RuntimeError:
                store = None
            if self._ended.wait(self.period):
                return

    def _here(self) -> Place:
        step, where = self._place
        return Place(self._rank, socket.gethostname(), step, where, self._moves, self._age, self._told, time.time())

    def _end(self) -> None:
        """Report and end the process; neither the others nor a disk can keep it from ending."""
        here = self._here()
        answer = _within(3 * self.period + 6, self._ask) if self._met is not None else Answer([str(here)], [self._rank], True)
        if self._ended.is_set() or self._beats != self._seen:
            self._age = 0.0  # it moved while we asked
            if isinstance(answer, Answer) and answer.first:
                _within(5, self._forget)
            return
        if isinstance(answer, str):
            answer = Answer([str(here), f"the other ranks could not be asked ({answer})"], [self._rank], True)
        _within(10, lambda: self._show(here, answer))
        os._exit(HUNG)

    def _show(self, here: Place, answer: Answer) -> None:
        lines = answer.lines if answer.first else [f"{here}; another rank reports on all"]
        say("\n  ".join([f"\nno progress for {self.seconds:g} s (guard.hang_seconds):", *lines]), error=True)
        if self._rank in answer.shown or answer.first:
            faulthandler.dump_traceback(2)
        if self._status is not None and (answer.first or self._status.main):
            self._status.write("hung", step=here.step, reason="; ".join(answer.lines), exit_status=HUNG)

    def _ask(self) -> Answer:
        """What there is to say of all ranks; the first rank that hangs asks them, the others take its answer."""
        assert self._met is not None
        store, world = self._met.client(), self._met.world
        if store.add("watch/askers", 1) == 1:
            before, apart = _places(store, world), 1.5 * self.period + 1
            self._ended.wait(apart)
            lines, shown = _report(_compare(before, _places(store, world), apart), world)
            store.set("watch/report", json.dumps([lines, shown]))
            return Answer(lines, shown, True)
        while not store.check(["watch/report"]):
            self._ended.wait(self.period / 4)
        lines, shown = json.loads(store.get("watch/report"))
        return Answer(lines, shown, False)

    def _forget(self) -> None:
        """Let the next hang be asked after anew."""
        assert self._met is not None
        for key in ("watch/askers", "watch/report"):
            self._met.client().delete_key(key)


@dataclass(frozen=True)
class Answer:
    """What there is to say of the ranks."""

    lines: list[str]
    shown: list[int]
    """The ranks that are named."""
    first: bool
    """This rank found it out and says it for all."""


def _within(seconds: float, act: Callable[[], T]) -> T | str:
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
