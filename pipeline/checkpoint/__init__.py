"""Checkpoints that are whole or absent: written aside, synced, hashed, renamed; only then are old ones removed.

    checkpoint-500/
      rank-00000.safetensors ...   the tensors; each rank writes its parts
      state.json                   step, configuration, data: what is no tensor
      manifest.json                every file's size and sha256, every tensor's type and shape; written last

Saving has two halves: `begin` copies the state, `finish` commits what a thread
has meanwhile written. A folder whose files do not match its manifest is named
and passed over for the one before. A checkpoint of any number of ranks, with
shards or without, is read by any other. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
import zlib
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from ..printable import say
from .manifest import NAME, Seals, broadcast, check_present, gather, rank, sync, verify, world, write_text
from .rankfile import DTYPES, Host, Place, not_finite, write_file
from .shares import to_write
from .stored import averages, load_into, load_state, load_tensors, raw_weights

__all__ = ["Store", "averages", "choose", "find", "load_into", "load_state", "load_tensors", "named", "raw_weights", "verify"]

PREFIX = "checkpoint-"
NOT_FINITE = "holds numbers that are not finite"
"""In an error of a save that would have kept a state gone wrong; other errors are the disk's."""


class Saving:
    """This rank's part of a save under way.

    Args:
        folder: where all ranks write, not yet the checkpoint's name.
        state: the text of state.json, which the first rank writes.
        listed: type and shape of every whole tensor, by name.
    """

    def __init__(self, folder: Path, state: str, listed: dict[str, Any]) -> None:
        self.folder, self.state, self.listed = folder, state, listed
        self.name = f"rank-{rank():05d}.safetensors"
        self.seals: Seals = {}
        self.told: dict[str, Any] = {}
        """What the first rank wants to know beside the seals: how many numbers this rank writes, and what it thinks all ranks write."""
        self.error: str | None = None
        self.thread: Thread | None = None

    def start(self, host: Host, tensors: dict[str, Tensor]) -> None:
        """Copy this rank's parts, and write the copies in a thread."""
        try:
            places = host.copy(to_write(tensors, rank(), world()))
        except (OSError, RuntimeError, MemoryError, ValueError) as problem:  # the other ranks wait to hear of it in `finish`
            self.error = f"rank {rank()}: {problem}"
        else:
            self.thread = Thread(target=self._write, args=(host, places), name="checkpoint", daemon=True)
            self.thread.start()

    def _write(self, host: Host, places: list[Place]) -> None:
        try:
            data = host.bytes(places[-1].stop if places else 0)
            if bad := not_finite(places, data):
                raise ValueError(f"{bad} {NOT_FINITE}")
            self.folder.mkdir(parents=True, exist_ok=True)
            if places:
                self.seals[self.name] = write_file(self.folder / self.name, places, data)
            self.told = {"numel": sum(place.part.box.numel for place in places), "listed": zlib.crc32(json.dumps(self.listed).encode())}
            if rank() == 0:
                self.seals["state.json"] = write_text(self.folder / "state.json", self.state)
        except Exception as problem:  # whatever it is, it must be said where the ranks meet
            self.error = f"rank {rank()}: {problem}"

    def discard(self) -> None:
        """Leave nothing of it: each rank its own file, the first one the folder."""
        with contextlib.suppress(OSError):
            if rank() == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                (self.folder / self.name).unlink(missing_ok=True)
                self.folder.rmdir()  # where a machine does not share the folder


class Store:
    """The checkpoints of one run.

    Args:
        root: the run's folder.
        keep: newest checkpoints that stay.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self.pending: int | None = None
        """The step whose save was begun and not finished."""
        self._saving: Saving | None = None
        self._host = Host()
        self._brooms: list[Thread] = []

    def reserve(self, tensors: dict[str, Tensor]) -> None:
        """Take the memory for copies of such a state, in a thread: the first `begin` is then as quick as others; each rank for itself."""
        self._host.reserve(to_write(tensors, rank(), world()))

    def begin(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Copy the state and start to write it; called by all ranks together, after the save before was finished.

        What is copied is this rank's part, into memory that is kept for the
        next save. The thread that writes it talks to no other rank.

        Args:
            step: optimiser steps done; names the folder.
            tensors: by name, the same names on every rank; shards as DTensors, plain tensors the same on every rank.
            state: anything JSON keeps.
        """
        assert self.pending is None, f"the save of step {self.pending} is not finished"
        text = json.dumps({**state, "world": world()}, indent=1)
        listed = {name: [DTYPES.get(t.dtype, str(t.dtype)), list(t.shape)] for name, t in tensors.items()}
        there = rank() == 0 and os.path.exists(self._path(step)) and verify(self._path(step)) is None
        there, name = broadcast((there, f".tmp-{step}-{uuid.uuid4().hex[:8]}"))
        self.pending = step
        if not there:  # it is there where a run was resumed and stopped again before a step was done
            self._saving = Saving(self.root / name, text, listed)
            self._saving.start(self._host, tensors)

    def busy(self) -> bool:
        """Whether this rank still writes; `finish` would wait for it."""
        thread = self._saving.thread if self._saving else None
        return thread is not None and thread.is_alive()

    def finish(self) -> list[str]:
        """Wait for what was begun and commit it; called by all ranks together, by the thread that trains.

        Returns:
            What went wrong on any rank, the same list on all; empty if all
            went well, or nothing was begun. After an error nothing of it is
            left, and older checkpoints are as they were.
        """
        saving, step = self._saving, self.pending
        self._saving = self.pending = None
        if saving is None or step is None:
            return []
        if saving.thread:
            saving.thread.join()
        gathered = gather((saving.seals, saving.told, saving.error))
        errors = [error for *_, error in gathered if error]
        if rank() == 0 and not errors:
            files = {name: seal for part, *_ in gathered for name, seal in part.items()}
            errors = self._commit(step, saving, files, [told for _, told, _ in gathered])
        errors = broadcast(errors)
        if errors:
            saving.discard()
        return errors

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> list[str]:
        """`begin` and `finish` in one, for those who can wait; arguments and answer as theirs."""
        self.begin(step, tensors, state)
        errors = self.finish()
        self.settle()
        return errors

    def _path(self, step: int) -> Path:
        return self.root / f"{PREFIX}{step}"

    def _commit(self, step: int, saving: Saving, files: Seals, told: list[dict[str, Any]]) -> list[str]:
        """Complete, rename and prune, on the first rank alone."""
        final = self._path(step)
        try:
            _check_alike(saving.listed, told)
            check_present(saving.folder, files)
            manifest = {"version": 2, "step": step, "world": world(), "files": files, "tensors": saving.listed}
            write_text(saving.folder / NAME, json.dumps(manifest, indent=1))
            sync(saving.folder)
            if final.exists():  # a damaged one: a good one is not written again
                os.rename(final, self.root / f".tmp-old-{uuid.uuid4().hex[:8]}")
            os.rename(saving.folder, final)
            sync(self.root)
        except Exception as problem:  # whatever it is: the other ranks wait for the answer
            return [f"rank 0: {problem}"]
        self._prune(step)
        return []

    def _prune(self, step: int) -> None:
        """Remove all but the newest; each is renamed first, so that none is ever half there under its name.

        Only what is older than the checkpoint just written goes. A later one
        is a damaged one that was passed over: it must not count as kept.
        """
        self._brooms = [broom for broom in self._brooms if broom.is_alive()]
        try:
            older = [folder for folder in self.folders() if _step(folder) <= step]
            for folder in older[self.keep :]:
                os.rename(folder, self.root / f".tmp-old-{uuid.uuid4().hex[:8]}")
            for folder in self.root.glob(".tmp-*"):
                broom = Thread(target=shutil.rmtree, args=(folder, True), name="broom", daemon=True)
                broom.start()
                self._brooms.append(broom)
        except (OSError, RuntimeError) as problem:
            say(f"an old checkpoint could not be removed: {problem}")

    def settle(self) -> None:
        """Wait until what was pruned is gone."""
        while self._brooms:
            self._brooms.pop().join()

    def sweep(self) -> None:
        """Remove what an interrupted save or removal left behind, on one rank alone."""
        for folder in self.root.glob(".tmp-*"):
            if self._saving is None or folder != self._saving.folder:
                shutil.rmtree(folder, ignore_errors=True)

    def folders(self) -> list[Path]:
        """Checkpoints by name, the newest first, good or not."""
        return sorted((p for p in self.root.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()), key=_step, reverse=True)

    def latest(self) -> Path | None:
        """The newest good checkpoint, the same on all ranks, which ask together; damaged ones are named and passed over."""
        for folder in broadcast(self.folders() if rank() == 0 else []):
            fault = verify(folder, together=True)
            if fault is None:
                return folder
            if rank() == 0:
                say(f"checkpoint {folder} is damaged and passed over: {fault}")
        return None


def _check_alike(listed: dict[str, Any], told: list[dict[str, Any]]) -> None:
    """Raises ValueError where ranks were given other tensors, or do not together hold all of them."""
    other = [number for number, one in enumerate(told) if one["listed"] != told[0]["listed"]]
    written, asked = sum(one["numel"] for one in told), sum(math.prod(shape) for _, shape in listed.values())
    if other or written != asked:
        raise ValueError(f"{written} of {asked} numbers were written, and ranks {other[:3]} named other tensors than the first")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def named(root: Path, resume: str) -> Path:
    """Return the folder that `checkpoint.resume` names: a path, or as diffusers' scripts have it a checkpoint of the run itself."""
    place = Path(resume)
    own = root / place.name
    return own if place.name.startswith(PREFIX) and len(place.parts) == 1 and (own.is_dir() or not place.is_dir()) else place


def choose(store: Store, resume: str) -> Path | None:
    """The checkpoint to go on from, the same on all ranks, which ask together; None to start afresh.

    Args:
        store: of the run.
        resume: `latest`, `none`, a checkpoint's folder, or its name in the run's folder, as `checkpoint-500`.

    Raises:
        ValueError: a start that newer checkpoints in the run's folder would outlive.
    """
    if resume == "latest":
        return store.latest()
    newest = broadcast(next(iter(store.folders()), None))
    if resume == "none":
        if newest is not None:
            raise ValueError(f"checkpoint.resume=none, but {store.root} holds {newest.name}: resume it, or give another --output_dir.")
        return None
    chosen = named(store.root, resume)
    if not chosen.is_dir():
        there = ", ".join(folder.name for folder in store.folders()) or "none"
        raise ValueError(f"checkpoint.resume={resume}: {chosen} is not there; {store.root} holds {there}. Give one of them, or latest.")
    verify(chosen, together=True)  # so that no rank has to read all of it
    step = load_state(chosen)["step"]
    if newest is not None and _step(newest) > step:
        raise ValueError(
            f"checkpoint.resume={resume} is older than {newest.name} in {store.root}: to branch off, give another --output_dir."
        )
    return chosen


def find(folder: Path) -> Path:
    """A whole checkpoint to start another run from: the folder itself, or the newest of a run's.

    Raises:
        ValueError: none there, or a damaged one.
    """
    found = folder if (folder / "state.json").exists() else Store(folder, keep=1).latest()
    if found is None:
        raise ValueError(f"checkpoint.start_from={str(folder)!r} holds no whole checkpoint: name a run's folder, or a checkpoint of it.")
    load_state(found)  # verified
    return found
