"""What a run shows: a progress bar, a line of metrics.jsonl, a tracker; all of it only when due."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
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
        """Keep the lines of steps that stay done; a torn last line goes too."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                done = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                done = False
            kept += [line + "\n"] if done else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)

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


def last_loss(folder: Path) -> float | None:
    """The loss of the last line of a run's metrics.jsonl, or None."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["loss"] if lines else None
