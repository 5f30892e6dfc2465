"""How a run stands, for scripts: `status.json` in its folder.

A launcher's exit status is 1 whatever happened, so what starts a run again
reads this file: `stopped` asks for it, `finished`, `failed` and `diverged` do
not, and `running` without a process means that the process was killed.
"""

from __future__ import annotations

import json
import signal as signals
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from condot.core.atomic_files import open_regular, write_whole
from condot.core.printable import one_line, say

RunState = Literal["running", "stopped", "finished", "diverged", "failed", "hung"]
NAME = "status.json"


class HeldLock(Protocol):
    """What is needed of a folder's lock: see pipeline.launch.folder_lock.FolderLock."""

    def lock_error(self) -> str: ...
    def current_path(self) -> Path | None: ...


class Status:
    """Writes status.json, whole or not at all; a disk that is full or gone is said once and stops nothing.

    To be made by whoever owns the folder's lock: another run's is left alone.

    Args:
        folder: of the run; seen by all ranks, or at least by rank 0.
        main: of rank 0, which writes all; others write only that the run hangs.
    """

    def __init__(self, folder: Path, main: bool = True) -> None:
        self.path = folder / NAME
        self.main = main
        self.lock: HeldLock | None = None
        """Of the folder: where it was moved, it is written there, and never into what stands in its old place."""
        self._progress: dict[str, int | None] = {"step": None, "of": None, "images": None}
        self._warned = False

    def write(
        self,
        state: RunState,
        *,
        step: int | None = None,
        of: int | None = None,
        images: int | None = None,
        signal: int | None = None,
        reason: str = "",
        exit_status: int | None = None,
    ) -> None:
        """Say how the run stands now.

        Args:
            state: `running` at the start and at log lines, else how it ended.
            step: optimiser steps done; what is left out stays as it was said before.
            of: optimiser steps in all.
            images: seen.
            signal: number of the signal that stopped it.
            reason: one line for people.
            exit_status: of rank 0's process.
        """
        given = {"step": step, "of": of, "images": images}
        self._progress |= {name: value for name, value in given.items() if value is not None}
        if not self.main and state != "hung":
            return
        late = state == "failed" or (state == "hung" and not self.main)
        if late and (read_status(self.path.parent) or {}).get("state") == "hung":
            return  # the first to say so knows most; ranks that were waiting fail when the one that hung is ended
        record = {
            "state": state,
            **self._progress,
            "signal": signals.Signals(signal).name if signal else None,
            "reason": one_line(reason) if reason else "",
            "exit_status": exit_status,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if self.lock and self.lock.lock_error():
            place = self.lock.current_path()
            if place is None:
                return
            self.path = place / NAME
        try:
            self._replace(json.dumps(record) + "\n", lasting=state != "running")
        except OSError as error:
            if not self._warned:
                say(f"{self.path} could not be written ({error.strerror}); the run goes on.", error=True)
            self._warned = True

    def _replace(self, text: str, lasting: bool) -> None:
        write_whole(self.path, text, lasting=lasting)


def read_status(folder: Path) -> dict[str, Any] | None:
    """What status.json of a run's folder says; None where there is none, or nothing that can be read."""
    try:
        with open(folder / NAME, opener=open_regular) as file:
            record = json.load(file)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
