"""The evidence of what went wrong, in two files of the run's folder.

bad_steps.jsonl has the skipped steps with the keys of their samples, rollbacks.jsonl what was
undone, bad steps among it, and which positions of the stream are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from condot.core.printable import say

from ..tracking.jsonl import JsonlWriter, Line, read_lines
from .step_stats import StepStats


class IncidentLog:
    """Both files, written by the main process.

    Args:
        folder: the run's.
        main: is this the main process?
        start: the step at which the run goes on: later bad steps come again.
        fresh: no checkpoint was found, so nothing in the files is of this run.
    """

    def __init__(self, folder: Path, *, main: bool, start: int, fresh: bool) -> None:
        self.bad_step_file, self.rollback_file, self.main = (
            JsonlWriter(folder / "bad_steps.jsonl"),
            JsonlWriter(folder / "rollbacks.jsonl"),
            main,
        )
        self.rollbacks = [] if fresh else read_lines(self.rollback_file.path, lambda line: "to_step" in line and "cursor" in line)
        if main and fresh:
            self.bad_step_file.path.unlink(missing_ok=True)
            self.rollback_file.path.unlink(missing_ok=True)
        self.drop_since(start)

    def bad_steps_since(self, step: int) -> list[Line]:
        """The bad steps from `step` on; of the main process."""
        return read_lines(self.bad_step_file.path, lambda line: line["step"] >= step) if self.main else []

    def drop_since(self, step: int) -> None:
        """Forget bad steps that come again."""
        if self.main:
            said = self.bad_step_file.filter(lambda line: line["step"] < step)
            if said:
                say(said, error=True)

    def record_bad_step(self, stats: StepStats, keys: Iterable[str]) -> None:
        """Write down a step that was not applied, and which samples it had."""
        self._append(self.bad_step_file, {"step": stats.step, "loss": repr(stats.loss), "grad_norm": repr(stats.norm), "keys": list(keys)})

    def record_rollback(self, line: Line) -> None:
        """Write down what was undone; known on all ranks."""
        self.rollbacks.append(line)
        self._append(self.rollback_file, line)

    def cursor_after_rollback(self, step: int) -> int:
        """Where in the stream a run that goes on from the checkpoint of `step` must go on, 0 if it was never led back there."""
        return max((line["cursor"] for line in self.rollbacks if line["to_step"] == step), default=0)

    def _append(self, file: JsonlWriter, line: Line) -> None:
        if self.main:
            file.append([line])
