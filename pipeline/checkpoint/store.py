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

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from condot.core.atomic_files import sync
from condot.core.printable import say

from . import disk_space
from .loading import averages, check_network, explain_errors, load_into, load_state, load_tensors, raw_weights
from .manifest import FileDigests, broadcast, check_files_visible, check_same_tensors, gather, rank, verify, world, write_manifest
from .rank_file import DTYPES, HostBuffer
from .saving import PendingSave
from .sharding import to_write

__all__ = [
    "CheckpointManager",
    "averages",
    "check_network",
    "find_checkpoint",
    "load_into",
    "load_state",
    "load_tensors",
    "raw_weights",
    "resolve_checkpoint",
    "select_checkpoint",
]
__all__ += ["explain_errors", "verify"]

PREFIX = "checkpoint-"


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        root: the run's folder.
        keep: newest checkpoints that stay.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self.lock_error: Callable[[], str] = str
        """Why `root` is not the folder that the run has locked, or ""; asked on the first rank before each commit."""
        self.pending: int | None = None
        """The step whose save was begun and not finished."""
        self._saving: PendingSave | None = None
        self._buffer = HostBuffer()
        self._cleanup_threads: list[Thread] = []

    def reserve_memory(self, tensors: dict[str, Tensor]) -> None:
        """Take the memory for copies of such a state, in a thread: the first `begin` is then as quick as others; each rank for itself."""
        self._buffer.reserve(to_write(tensors, rank(), world()))

    def check_disk_space(self, tensors: dict[str, Tensor], saves: int) -> None:
        """See that the disk can hold what is to be kept of such a state, and one more while it is written; called by all ranks together.

        Args:
            tensors: as in `begin`.
            saves: that are still to come.

        Raises:
            ValueError: it cannot, or a limit on files or a quota forbids it.
        """
        there = len(self.folders()) if rank() == 0 else 0
        disk_space.check_disk_space(self.root, tensors, min(saves, self.keep + 1 - min(self.keep, there)))

    def check_lock(self) -> None:
        """Raise ValueError where the run's folder is not its own any more, on all ranks, which ask together."""
        if lock_error := broadcast(self.lock_error() if rank() == 0 else ""):
            raise ValueError(lock_error)

    def begin(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Copy the state and start to write it; called by all ranks together, after the save before was finished.

        What is copied is this rank's part, into memory that is kept for the
        next save. The thread that writes it talks to no other rank.

        Args:
            step: optimiser steps done; names the folder.
            tensors: by name, the same names on every rank; shards as DTensors, plain tensors the same on every rank.
            state: anything JSON keeps.

        Raises:
            ValueError: the run's folder is not its own any more.
        """
        assert self.pending is None, f"the save of step {self.pending} is not finished"
        text = json.dumps({**state, "world": world()}, indent=1)
        tensor_index = {name: [DTYPES.get(t.dtype, str(t.dtype)), list(t.shape)] for name, t in tensors.items()}
        self.check_lock()
        there = rank() == 0 and os.path.exists(self._path(step)) and verify(self._path(step)) is None
        there, name = broadcast((there, f".tmp-{step}-{uuid.uuid4().hex[:8]}"))
        self.pending = step
        if not there:  # it is there where a run was resumed and stopped again before a step was done
            self._saving = PendingSave(self.root / name, text, tensor_index)
            self._saving.start(self._buffer, tensors)

    def is_writing(self) -> bool:
        """Whether this rank still writes; `finish` would wait for it."""
        thread = self._saving.thread if self._saving else None
        return thread is not None and thread.is_alive()

    def finish(self) -> list[str]:
        """Wait for what was begun and commit it; called by all ranks together, by the thread that trains.

        Returns:
            What went wrong on any rank, the same list on all; empty if all
            went well, or nothing was begun. After an error nothing of it is
            left, and older checkpoints are as they were.

        Raises:
            ValueError: the run's folder is not its own any more.
        """
        saving, step = self._saving, self.pending
        self._saving = self.pending = None
        if saving is None or step is None:
            if step is not None and rank() == 0:
                self._prune(step)  # it was there: who wrote it may have been killed before the older ones went
            return []
        if saving.thread:
            saving.thread.join()
        gathered = gather((saving.digests, saving.report, saving.error))
        errors = [error for *_, error in gathered if error]
        try:
            self.check_lock()
        except ValueError:
            saving.discard()
            raise
        if rank() == 0 and not errors:
            files = {name: digest for part, *_ in gathered for name, digest in part.items()}
            errors = self._commit(step, saving, files, [report for _, report, _ in gathered])
        errors = broadcast(errors)
        if errors:
            saving.discard()
        return errors

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> list[str]:
        """`begin` and `finish` in one, for those who can wait; arguments and answer as theirs."""
        self.begin(step, tensors, state)
        errors = self.finish()
        self.wait_for_cleanup()
        return errors

    def _path(self, step: int) -> Path:
        return self.root / f"{PREFIX}{step}"

    def _commit(self, step: int, saving: PendingSave, files: FileDigests, reports: list[dict[str, Any]]) -> list[str]:
        """Complete, rename and prune, on the first rank alone."""
        final = self._path(step)
        try:
            check_same_tensors(saving.tensor_index, reports)
            check_files_visible(saving.folder, files)
            write_manifest(saving.folder, step, files, saving.tensor_index)
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
        self._cleanup_threads = [thread for thread in self._cleanup_threads if thread.is_alive()]
        try:
            older = [folder for folder in self.folders() if _step(folder) <= step]
            for folder in older[self.keep :]:
                os.rename(folder, self.root / f".tmp-old-{uuid.uuid4().hex[:8]}")
            for folder in self.root.glob(".tmp-*"):
                thread = Thread(target=shutil.rmtree, args=(folder, True), name="cleanup", daemon=True)
                thread.start()
                self._cleanup_threads.append(thread)
        except (OSError, RuntimeError) as problem:
            say(f"an old checkpoint could not be removed: {problem}")

    def wait_for_cleanup(self) -> None:
        """Wait until what was pruned is gone."""
        while self._cleanup_threads:
            self._cleanup_threads.pop().join()

    def remove_leftovers(self, good: Path | None = None) -> None:
        """Remove what an interrupted save or removal left behind, on one rank alone; and what is older than is kept beside a good one."""
        if good and good.parent == self.root:
            self._prune(_step(good))
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


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def resolve_checkpoint(root: Path, resume: str) -> Path:
    """Return the folder that `checkpoint.resume` names: a path, or as diffusers' scripts have it a checkpoint of the run itself."""
    place = Path(resume)
    own = root / place.name
    return own if place.name.startswith(PREFIX) and len(place.parts) == 1 and (own.is_dir() or not place.is_dir()) else place


def select_checkpoint(manager: CheckpointManager, resume: str) -> Path | None:
    """The checkpoint to go on from, the same on all ranks, which ask together; None to start afresh.

    Args:
        manager: of the run.
        resume: `latest`, `none`, a checkpoint's folder, or its name in the run's folder, as `checkpoint-500`.

    Raises:
        ValueError: a start that newer checkpoints in the run's folder would outlive.
    """
    if resume == "latest":
        return manager.latest()
    newest = broadcast(next(iter(manager.folders()), None))
    if resume == "none":
        if newest is not None:
            raise ValueError(f"checkpoint.resume=none, but {manager.root} holds {newest.name}: resume it, or give another --output_dir.")
        return None
    selected = resolve_checkpoint(manager.root, resume)
    if not selected.is_dir():
        there = ", ".join(folder.name for folder in manager.folders()) or "none"
        raise ValueError(f"checkpoint.resume={resume}: {selected} is not there; {manager.root} holds {there}. Give one of them, or latest.")
    verify(selected, together=True)  # so that no rank has to read all of it
    step = load_state(selected)["step"]
    if newest is not None and _step(newest) > step:
        raise ValueError(
            f"checkpoint.resume={resume} is older than {newest.name} in {manager.root}: to branch off, give another --output_dir."
        )
    return selected


def find_checkpoint(folder: Path) -> Path:
    """A whole checkpoint to start another run from: the folder itself, or the newest of a run's.

    Raises:
        ValueError: none there, or a damaged one.
    """
    found = folder if (folder / "state.json").exists() else CheckpointManager(folder, keep=1).latest()
    if found is None:
        raise ValueError(f"checkpoint.start_from={str(folder)!r} holds no whole checkpoint: name a run's folder, or a checkpoint of it.")
    load_state(found)  # verified
    return found
