"""What a bad step does: one is skipped, several in a row or a spike lead back to the last good checkpoint, and past its data.

A step whose loss or gradient is not finite on any rank is applied on none.
The evidence is kept in the run's folder: bad_steps.jsonl has the skipped steps
with the keys of their samples, rollbacks.jsonl what was undone, bad steps
among it, and which positions of the stream are passed over.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from condot.core.printable import say

from ..config.schema import GuardConfig
from ..tracking.jsonl import JsonlWriter, Line, read_lines
from .step_stats import StepStats

MAX_OVERFLOWS = 40
"""Steps in a row: fp16's scaler, which begins at 2^16 and halves, is then far below any gradient that it could help."""


class TrainingDiverged(Exception):
    """A run that was led back too often, or could not be."""


class Guard:
    """Judges steps by what all ranks know of them, so that all judge alike.

    Args:
        config: what is borne.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.norms: deque[float] = deque(maxlen=config.window)
        self.consecutive_bad = 0
        """Bad steps since the last good one."""
        self.overflows = 0
        """Likewise those that fp16's scaler passed over."""
        self.skipped = 0
        """In this run."""

    def check(self, stats: StepStats) -> str:
        """Take note of a step; why it must be undone, or ""."""
        if stats.bad:
            self.consecutive_bad += 1
            self.skipped += 1
            if self.consecutive_bad > self.config.skips:
                return f"{self.consecutive_bad} steps in a row have a loss or gradient that is not finite"
            return ""
        self.consecutive_bad = 0
        self.overflows = 0 if math.isfinite(stats.norm) else self.overflows + 1
        if self.overflows > MAX_OVERFLOWS:
            return f"{self.overflows} steps in a row have a gradient that is not finite, however small fp16's scale"
        for what, value, past, limit in (
            ("loss", stats.loss, self.losses, self.config.loss_spike),
            ("gradient's norm", stats.norm, self.norms, self.config.norm_spike),
        ):
            if limit and len(past) == past.maxlen and value > limit * statistics.median(past):
                return (
                    f"the {what} {value:.4g} is over {limit:g} times the median {statistics.median(past):.4g} of the last {len(past)} steps"
                )
        self.losses.append(stats.loss)
        if not self.overflows:
            self.norms.append(stats.norm)
        return ""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "row": self.consecutive_bad,
            "overflows": self.overflows,
            "skipped": self.skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, or afresh from an empty one."""
        for past, name in ((self.losses, "losses"), (self.norms, "norms")):
            past.clear()
            past.extend(state.get(name, ()))
        self.consecutive_bad, self.overflows, self.skipped = (state.get(name, 0) for name in ("row", "overflows", "skipped"))


class IncidentLog:
    """The two files, written by the main process.

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
