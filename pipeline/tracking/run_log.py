"""What a run shows: a progress bar, a line of metrics.jsonl, trackers; all of it only when due."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from tqdm import tqdm

from condot.core.printable import one_line, printable, redact, say

from .jsonl import JsonlWriter, Line, read_lines
from .trackers import finish_trackers

LogMethod = TypeVar("LogMethod", bound=Callable[..., Any])


def never_raises(log_method: LogMethod) -> LogMethod:
    """Make a method of a RunLog raise nothing: what it shows is no part of the run. Each kind of error is said once."""

    @functools.wraps(log_method)
    def guarded(log: RunLog, *given: Any, **named: Any) -> Any:
        try:
            return log_method(log, *given, **named)
        except Exception as error:
            kind = f"{log_method.__name__}: {type(error).__name__}"
            if kind not in log.reported_errors:
                log.reported_errors.add(kind)
                say(f"the log failed to {log_method.__name__} ({type(error).__name__}: {one_line(error)}); the run goes on.", error=True)
            return None

    return guarded  # type: ignore[return-value]


class RunLog:
    """metrics.jsonl, the progress bar and the trackers of one run, on the main process; silent on the others.

    Nothing of it raises: a run is not ended by what it tells.

    Args:
        folder: the run's.
        main: is this the main process?
        start, stop: optimiser steps of this launch; lines after `start` are
            dropped, since their steps are done again.
        accelerator: whose trackers are told, if it has some.
    """

    def __init__(self, folder: Path, *, main: bool, start: int, stop: int, accelerator: Accelerator) -> None:
        self.lines, self.main, self.accelerator = JsonlWriter(folder / "metrics.jsonl"), main, accelerator
        self.reported_errors: set[str] = set()
        """Kinds of errors that were said."""
        is_terminal = sys.stderr.isatty()  # a file, as batch systems keep, would grow by megabytes a day
        refresh: dict[str, Any] = {"mininterval": 0.5 if is_terminal else 30.0, "maxinterval": 10.0 if is_terminal else 60.0}
        self.bar = tqdm(total=stop, initial=start, disable=not main, unit="step", smoothing=0.02, dynamic_ncols=True, **refresh)
        if main:
            self.say(self.lines.filter(lambda line: line["step"] <= start))

    @never_raises
    def advance(self) -> None:
        """One optimiser step is done."""
        self.bar.update()

    def rewind(self, step: int) -> list[Line]:
        """Go back to a step: the lines after it are dropped, here and by trackers that can, since they come again; they are returned."""
        return (self._rewind(step) if self.main else None) or []

    @never_raises
    def _rewind(self, step: int) -> list[Line]:
        dropped = read_lines(self.lines.path, lambda line: line["step"] > step)
        self.say(self.lines.filter(lambda line: line["step"] <= step))
        self.bar.n = step
        self.bar.refresh()
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "rewind"):
                tracker.rewind(step)
        return dropped

    @never_raises
    def write(self, step: int, images: int, values: dict[str, Any]) -> None:
        """Append a line: step, images seen, and the values, null where there is none; the bar shows the loss and the rate."""
        if not self.main:
            return
        self.say(self.lines.append([{"step": step, "images": images, **values}]))
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        shown = {"loss": "loss {:.4f}", "images_per_second": "{:.0f} images/s", "mfu": "MFU {:.2f}"}
        self.bar.set_postfix_str(", ".join(text.format(known[name]) for name, text in shown.items() if name in known), refresh=False)
        self.accelerator.log({"images": images, **known}, step=step)
        for tracker in self.accelerator.trackers:
            for text in tracker.take_messages() if hasattr(tracker, "take_messages") else ():
                self.say(text)

    @never_raises
    def say(self, text: str) -> None:
        """Print a line above the bar, if there is one to print."""
        if self.main and text:
            self.bar.write(printable(redact(text), lines=True))

    @never_raises
    def close(self) -> None:
        """Finish the bar and the trackers, which get some seconds for what they did not send yet."""
        self.bar.close()
        if not self.main:
            return
        self.say(self.lines.append([]))
        if self.lines.pending:
            self.say(f"{len(self.lines.pending)} lines of {self.lines.path} could not be written, and are lost.")
        for text in finish_trackers(self.accelerator.trackers):
            self.say(text)


def loss_curve(folder: Path) -> list[tuple[float, float]]:
    """(images seen, loss) of each line of a run's metrics.jsonl, in its order; lines without a finite loss are left out."""
    lines = read_lines(folder / "metrics.jsonl", lambda line: math.isfinite(line["loss"]) and math.isfinite(line["images"]))
    return [(line["images"], line["loss"]) for line in lines]


def last_loss(folder: Path) -> float | None:
    """The last loss of a run's metrics.jsonl, or None."""
    curve = loss_curve(folder)
    return curve[-1][1] if curve else None
