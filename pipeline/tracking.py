"""What a run shows: a progress bar, a line of metrics.jsonl, a tracker; all of it only when due."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm


class Meter:
    """Sums on the device between two log lines; reading it is the loop's only wait."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        """Start the next interval."""
        self.loss = torch.zeros((), device=self.accelerator.device)
        self.norm = torch.zeros((), device=self.accelerator.device)
        self.batches = self.steps = self.timed = 0
        self.since = time.perf_counter()

    def add(self, losses: Tensor) -> None:
        """Count a micro-batch's losses, (B,)."""
        self.loss += losses.detach().mean()
        self.batches += 1

    def add_step(self, norm: Tensor) -> None:
        """Count an optimiser step and its gradient norm, a scalar."""
        self.norm += norm
        self.steps += 1
        self.timed += 1

    def state(self) -> dict[str, float]:
        """The sums so far, means over ranks, for a checkpoint in the middle of an interval; all ranks together."""
        loss, norm = self.accelerator.reduce(torch.stack([self.loss, self.norm]), reduction="mean").tolist()
        return {"loss": loss, "norm": norm, "batches": self.batches, "steps": self.steps}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from `state`."""
        self.loss.fill_(state["loss"])
        self.norm.fill_(state["norm"])
        self.batches, self.steps = int(state["batches"]), int(state["steps"])

    def read(self, batch_size: int) -> dict[str, float]:
        """Means over the interval and all ranks, then reset.

        Returns:
            loss, grad_norm, and images_per_second of all ranks together.
        """
        sums = torch.stack([self.loss / max(self.batches, 1), self.norm / max(self.steps, 1)])
        loss, norm = self.accelerator.reduce(sums, reduction="mean").tolist()
        rate = self.timed * batch_size / max(time.perf_counter() - self.since, 1e-9)
        self.reset()
        return {"loss": loss, "grad_norm": norm, "images_per_second": rate}


class Log:
    """metrics.jsonl, the progress bar and the tracker of one run, on the main process; silent on the others.

    Args:
        folder: the run's.
        main: is this the main process?
        start, stop: optimiser steps of this launch; lines after `start` are
            dropped, since their steps are done again.
        accelerator: whose tracker is told, if it has one.
    """

    def __init__(self, folder: Path, *, main: bool, start: int, stop: int, accelerator: Accelerator) -> None:
        self.path, self.main, self.accelerator = folder / "metrics.jsonl", main, accelerator
        self.bar = tqdm(total=stop, initial=start, disable=not main, unit="step", mininterval=0.5, smoothing=0.02, dynamic_ncols=True)
        if main:
            self._drop_after(start)

    def _drop_after(self, step: int) -> None:
        """Keep the lines of steps that stay done."""
        if self.path.exists():
            _rewrite(self.path, _lines(self.path, lambda line: line["step"] <= step))

    def advance(self) -> None:
        """One optimiser step is done."""
        self.bar.update()

    def write(self, step: int, images: int, values: dict[str, float]) -> None:
        """Append a line: step, images seen, and the values; the bar shows the loss and the rate."""
        if not self.main:
            return
        line: dict[str, Any] = {"step": step, "images": images, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s")
        self.accelerator.log(values, step=step)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.main:
            self.bar.write(text)

    def close(self) -> None:
        """Finish the bar."""
        self.bar.close()


def _lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The lines of a .jsonl file that `keep` keeps; one that a kill tore is none."""
    kept = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            kept += [line] if keep(line) else []
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(path)


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
        self.lines = _lines(self.path, lambda line: line["position"] < start)
        if main and self.path.exists():
            _rewrite(self.path, self.lines)

    def report(self, found: Iterable[Any], images: int) -> int:
        """Take note of what all ranks replaced; all ranks together.

        Args:
            found: since the last call, on this rank; each with the fields position, shard, key, error.
            images: seen so far by all ranks together.

        Returns:
            How many there were in this run.

        Raises:
            ValueError: more than the share of the images seen, or of a
                thousand while fewer were seen, with the list.
        """
        new = sorted(gather_object([fault._asdict() for fault in found]), key=lambda line: line["position"])
        self.lines += new
        if new and self.main:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in new)
        if len(self.lines) > self.share * max(images, 1000):
            listed = "; ".join(f"{line['shard']}: {line['key']} ({line['error']})" for line in self.lines[-10:])
            raise ValueError(
                f"{len(self.lines)} bad samples among {images} images are more than data.max_bad_share={self.share:g} allows. The last: "
                f"{listed}. All are in {self.path}: mend or leave them out (`python -m data.inspect` finds them), or raise the share."
            )
        return len(self.lines)


def loss_curve(folder: Path) -> list[tuple[float, float]]:
    """(images seen, loss) of each line of a run's metrics.jsonl, in its order; lines without a finite loss are left out."""
    lines = _lines(folder / "metrics.jsonl", lambda line: math.isfinite(line["loss"]) and math.isfinite(line["images"]))
    return [(line["images"], line["loss"]) for line in lines]


def last_loss(folder: Path) -> float | None:
    """The last loss of a run's metrics.jsonl, or None."""
    curve = loss_curve(folder)
    return curve[-1][1] if curve else None
