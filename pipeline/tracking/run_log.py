"""What a run shows: a progress bar, a line of metrics.jsonl, trackers; all of it only when due."""

from __future__ import annotations

import contextlib
import functools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from condot.core.printable import one_line, printable, redact, say
from condot.core.process import DataError

from .jsonl import JsonlWriter, Line, read_lines
from .mfu import MfuEstimator
from .trackers import finish_trackers


class Meter:
    """Sums on the device between two log lines; reading it is the loop's only wait.

    Args:
        accelerator: of the run.
        mfu: what an image computes and what a device could; without it the utilisation is not known.
    """

    def __init__(self, accelerator: Accelerator, mfu: MfuEstimator | None = None) -> None:
        self.accelerator, self.mfu = accelerator, mfu or MfuEstimator()
        self.reset()

    def reset(self) -> None:
        """Start the next interval."""
        self.loss, self.norm, self.good = torch.zeros((3,), device=self.accelerator.device).unbind()
        self.steps, self.data_wait_seconds = 0, 0.0
        self.started_at = time.perf_counter()

    def add_step(self, loss: Tensor, norm: Tensor, bad: Tensor) -> None:
        """Count an optimiser step.

        Args:
            loss: mean of this rank's samples, a scalar on the device.
            norm: of the gradient.
            bad: 1 if the step changed nothing, and enters no mean; nor does one whose gradient overflowed in fp16.
        """
        good = (bad == 0) & norm.isfinite()
        self.loss += torch.where(good, loss, 0)
        self.norm += torch.where(good, norm, 0)
        self.good += good
        self.steps += 1

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around what waits for data."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.data_wait_seconds += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training, such as saving and sampling: the rates leave it out."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.started_at += time.perf_counter() - began

    def count(self, encode_batch: Callable[[], tuple[Any, ...]]) -> str:
        """On the main process, once, what one micro-batch computes: see MfuEstimator.count."""
        if self.mfu.counted or not self.accelerator.is_main_process:
            return ""
        with self.paused():
            return self.mfu.count(encode_batch)

    def state(self) -> dict[str, float]:
        """The sums so far, means over ranks, for a checkpoint in the middle of an interval; all ranks together."""
        sums = self.accelerator.reduce(torch.stack([self.loss, self.norm, self.good]), reduction="mean")
        return dict(zip(("loss", "norm", "good"), sums.tolist(), strict=True))

    def restore(self, state: dict[str, float]) -> None:
        """Go on from `state`."""
        self.reset()
        for name in ("loss", "norm", "good"):
            getattr(self, name).fill_(state.get(name, 0.0))

    def read(self, batch_size: int, bad: int = 0) -> dict[str, float | None]:
        """Figures of the interval, then reset; all ranks together, in one exchange.

        Args:
            batch_size: images of a step, all ranks together.
            bad: samples that this rank replaced in the interval.

        Returns:
            loss, grad_norm: means over its steps and all ranks; None of no step.
            images_per_second: of all ranks; images_per_second_per_device.
            mfu, mfu_with_encoders: shares of a device's peak, on the main process; None where not known.
            data_wait, data_wait_worst: share of the time that `data_wait` took, mean and of the rank that waited longest.
            memory_gb: the most that a rank held since it began, in 1e9 bytes: of its device, or of the process on a CPU.
            bad_samples: of the interval, on all ranks.
        """
        device = self.accelerator.device
        means_of_rank = torch.stack([self.loss, self.norm]) / self.good.clamp(min=1)
        other_figures = torch.tensor([self.data_wait_seconds, memory_gb(device), bad], device=device)
        found = self.accelerator.gather(torch.cat([means_of_rank, self.good[None], other_figures])[None])
        means, most = torch.stack([found.mean(dim=0), found.amax(dim=0)]).tolist()
        seconds = max(time.perf_counter() - self.started_at, 1e-9)
        rate, ranks = self.steps * batch_size / seconds, len(found)
        values: dict[str, float | None] = {
            "loss": means[0] if most[2] else None,
            "grad_norm": means[1] if most[2] else None,
            "images_per_second": _significant(rate),
            "images_per_second_per_device": _significant(rate / ranks),
            **{name: _significant(share) for name, share in self.mfu.mfu_values(rate / ranks).items()},
            "data_wait": _significant(min(means[3] / seconds, 1.0)),
            "data_wait_worst": _significant(min(most[3] / seconds, 1.0)),
            "memory_gb": _significant(most[4]),
            "bad_samples": round(means[5] * ranks),
        }
        self.reset()
        return values


def _significant(value: float | None) -> float | None:
    """With the digits that a measurement has."""
    return None if value is None else float(f"{value:.5g}")


def memory_gb(device: torch.device) -> float:
    """The most that torch held on a GPU, or this process in memory, since it began; 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:  # not getrusage: on Linux its figure may be that of the launcher, from which the process was forked
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


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


class BadSamples:
    """The samples that the stream had to replace, on all ranks: counted, listed in bad_samples.jsonl, and too many of them an error.

    Args:
        folder: the run's.
        share: of all images seen that may be bad.
        main: is this the main process?
        start: images seen so far; lines of later positions are dropped, since they come again.
    """

    def __init__(self, folder: Path, *, share: float, main: bool, start: int) -> None:
        self.path, self.share, self.main = folder / "bad_samples.jsonl", share, main
        self.file = JsonlWriter(self.path)
        self.lines = read_lines(self.path, lambda line: line["position"] < start)
        if main and (said := self.file.filter(lambda line: line["position"] < start)):
            say(said, error=True)

    def report(self, found: Iterable[Any], images: int, *, any_rank: bool = True) -> int:
        """Take note of what all ranks replaced; all ranks together.

        Args:
            found: since the last call, on this rank; each with the fields position, shard, key, error.
            images: seen so far by all ranks together.
            any_rank: false where it is known that no rank found any; nothing is exchanged then.

        Returns:
            How many there were in this run.
        """
        new = (
            sorted(gather_object([{**fault._asdict(), "error": redact(fault.error)} for fault in found]), key=lambda line: line["position"])
            if any_rank
            else []
        )
        self.lines += new
        if self.main:
            self.file.append(new)
        return len(self.lines)

    def check(self, images: int) -> None:
        """Raises DataError where more than the share of the images seen was bad, or of a thousand while fewer were seen, with the list."""
        if len(self.lines) > self.share * max(images, 1000):
            listed = "; ".join(f"{line['shard']}: {line['key']} ({line['error']})" for line in self.lines[-10:])
            raise DataError(
                f"{len(self.lines)} bad samples among {images} images are more than data.max_bad_share={self.share:g} allows. The last: "
                f"{listed}. All are in {self.path}: mend or leave them out (`python -m data.inspect` finds them), or raise the share."
            )


def loss_curve(folder: Path) -> list[tuple[float, float]]:
    """(images seen, loss) of each line of a run's metrics.jsonl, in its order; lines without a finite loss are left out."""
    lines = read_lines(folder / "metrics.jsonl", lambda line: math.isfinite(line["loss"]) and math.isfinite(line["images"]))
    return [(line["images"], line["loss"]) for line in lines]


def last_loss(folder: Path) -> float | None:
    """The last loss of a run's metrics.jsonl, or None."""
    curve = loss_curve(folder)
    return curve[-1][1] if curve else None
