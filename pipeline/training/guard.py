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
from ..tracking.jsonl import Line, Lines, read_lines
from .step_stats import Beat

OVERFLOWS = 40
"""Steps in a row: fp16's scaler, which begins at 2^16 and halves, is then far below any gradient that it could help."""


class Diverged(Exception):
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
        self.row = 0
        """Bad steps since the last good one."""
        self.overflows = 0
        """Likewise those that fp16's scaler passed over."""
        self.skipped = 0
        """In this run."""

    def judge(self, beat: Beat) -> str:
        """Take note of a step; why it must be undone, or ""."""
        if beat.bad:
            self.row += 1
            self.skipped += 1
            if self.row > self.config.skips:
                return f"{self.row} steps in a row have a loss or gradient that is not finite"
            return ""
        self.row = 0
        self.overflows = 0 if math.isfinite(beat.norm) else self.overflows + 1
        if self.overflows > OVERFLOWS:
            return f"{self.overflows} steps in a row have a gradient that is not finite, however small fp16's scale"
        for what, value, seen, most in (
            ("loss", beat.loss, self.losses, self.config.loss_spike),
            ("gradient's norm", beat.norm, self.norms, self.config.norm_spike),
        ):
            if most and len(seen) == seen.maxlen and value > most * statistics.median(seen):
                return (
                    f"the {what} {value:.4g} is over {most:g} times the median {statistics.median(seen):.4g} of the last {len(seen)} steps"
                )
        self.losses.append(beat.loss)
        if not self.overflows:
            self.norms.append(beat.norm)
        return ""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "row": self.row,
            "overflows": self.overflows,
            "skipped": self.skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, or afresh from an empty one."""
        for seen, name in ((self.losses, "losses"), (self.norms, "norms")):
            seen.clear()
            seen.extend(state.get(name, ()))
        self.row, self.overflows, self.skipped = (state.get(name, 0) for name in ("row", "overflows", "skipped"))


class Evidence:
    """The two files, written by the main process.

    Args:
        folder: the run's.
        main: is this the main process?
        start: the step at which the run goes on: later bad steps come again.
        fresh: no checkpoint was found, so nothing in the files is of this run.
    """

    def __init__(self, folder: Path, *, main: bool, start: int, fresh: bool) -> None:
        self.bad, self.undone, self.main = Lines(folder / "bad_steps.jsonl"), Lines(folder / "rollbacks.jsonl"), main
        self.rollbacks = [] if fresh else read_lines(self.undone.path, lambda line: "to_step" in line and "cursor" in line)
        if main and fresh:
            self.bad.path.unlink(missing_ok=True)
            self.undone.path.unlink(missing_ok=True)
        self.drop_after(start)

    def after(self, step: int) -> list[Line]:
        """The bad steps from `step` on; of the main process."""
        return read_lines(self.bad.path, lambda line: line["step"] >= step) if self.main else []

    def drop_after(self, step: int) -> None:
        """Forget bad steps that come again."""
        if self.main:
            said = self.bad.keep(lambda line: line["step"] < step)
            if said:
                say(said, error=True)

    def skipped(self, beat: Beat, keys: Iterable[str]) -> None:
        """Write down a step that was not applied, and which samples it had."""
        self._append(self.bad, {"step": beat.step, "loss": repr(beat.loss), "grad_norm": repr(beat.norm), "keys": list(keys)})

    def rolled_back(self, line: Line) -> None:
        """Write down what was undone; known on all ranks."""
        self.rollbacks.append(line)
        self._append(self.undone, line)

    def cursor(self, step: int) -> int:
        """Where in the stream a run that goes on from the checkpoint of `step` must go on, 0 if it was never led back there."""
        return max((line["cursor"] for line in self.rollbacks if line["to_step"] == step), default=0)

    def _append(self, file: Lines, line: Line) -> None:
        if self.main:
            file.append([line])
