"""Rendezvous of the processes of a launch: a store of keys, and one number for this attempt.

torchrun keeps its store from attempt to attempt (torch 2.13), so what a dead
attempt left there is met by the next, which then hangs or joins the dead.
TORCHELASTIC_RESTART_COUNT tells attempts apart on one machine only: each agent
counts its own. So the processes agree on a number that no attempt had before,
over the same store, and all that follows stands below it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

from torch.distributed import DistError, PrefixStore, Store, TCPStore

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
"""How long one process waits for the others to start."""
MAX_LISTED_RANKS = 8
"""So many ranks are named in a message."""


@dataclass(frozen=True)
class Rendezvous:
    """Of this attempt: who came, and where its keys are."""

    host: str
    port: int
    rank: int
    world_size: int
    attempt: int
    store: Store
    """Of the process group; a thread that asks beside it needs `client`."""

    def client(self) -> Store:
        """Another connection to the same keys: a store serves one question after the other."""
        return self._prefixed(TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)))

    @property
    def attempt_store(self) -> Store:
        """The keys of this attempt."""
        return self._prefixed(self.store)

    def _prefixed(self, store: Store) -> Store:
        return PrefixStore(f"condot/{self.attempt}", store)


def next_rendezvous(timeout: timedelta = RENDEZVOUS_TIMEOUT) -> Rendezvous | None:
    """Meet the other processes of this launch; None for a process that no launcher started.

    Raises:
        ValueError: some did not come, or the port is taken.
    """
    if "WORLD_SIZE" not in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address = f"MASTER_ADDR={host} MASTER_PORT={port}"
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(host, port, world_size, is_server, timeout, wait_for_workers=False, multi_tenant=True)
        number = (
            _serve_rendezvous(store, world_size, timeout, address)
            if rank == 0
            else _join_rendezvous(store, rank, world_size, timeout, address)
        )
    except DistError as error:
        first = str(error).splitlines()[0]
        remedy = "give another port" if is_server else "is rank 0 started, and does its machine let this one in?"
        raise ValueError(f"{address}: rank {rank} of {world_size} could not meet the others there ({first}): {remedy}") from error
    return Rendezvous(host, port, rank, world_size, number, store)


def _serve_rendezvous(store: Store, world_size: int, timeout: timedelta, address: str) -> int:
    """Rank 0: give every process the number, until each has said that it has it.

    A word of a dead process may stand under `hello`; it is answered and never
    says that it has the number.
    """
    number = store.add("condot/attempts", 1)
    missing, answered = set(range(1, world_size)), dict[int, str]()
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"condot/has/{rank}"]) and int(store.get(f"condot/has/{rank}")) == number:
                missing.discard(rank)
            elif store.check([f"condot/hello/{rank}"]):
                hello = store.get(f"condot/hello/{rank}").decode()
                if answered.get(rank) != hello:
                    store.set(f"condot/welcome/{rank}", f"{hello} {number}")
                    answered[rank] = hello
        if missing and time.monotonic() > deadline:
            names = ", ".join(str(rank) for rank in sorted(missing)[:MAX_LISTED_RANKS]) + (
                ", ..." if len(missing) > MAX_LISTED_RANKS else ""
            )
            raise ValueError(
                f"{len(missing)} of {world_size} processes did not come to {address} in {timeout.total_seconds():.0f} s: rank {names}. "
                f"Start the launcher on every machine, and see there why it ended."
            )
        time.sleep(_poll_seconds(world_size))
    store.set(f"condot/{number}/begun", "")
    return number


def _join_rendezvous(store: Store, rank: int, world_size: int, timeout: timedelta, address: str) -> int:
    """The others: say hello by a name of one's own, take the number that answers it, and wait until all have it."""
    hello, number = uuid4().hex, 0
    store.set(f"condot/hello/{rank}", hello)
    deadline = time.monotonic() + timeout.total_seconds()
    while not (number and store.check([f"condot/{number}/begun"])):
        if store.check([f"condot/welcome/{rank}"]):
            to, given = store.get(f"condot/welcome/{rank}").decode().split()
            if to == hello and int(given) != number:
                number = int(given)
                store.set(f"condot/has/{rank}", given)
        if time.monotonic() > deadline:
            reason = "others did not come" if number else "rank 0 did not come"
            raise ValueError(f"rank {rank} of {world_size} waited {timeout.total_seconds():.0f} s at {address}: {reason}.")
        time.sleep(_poll_seconds(world_size))
    return number


def _poll_seconds(world_size: int) -> float:
    """Seconds between two questions, so that thousands of processes ask one store no more than it answers."""
    return 0.02 + world_size / 10_000
