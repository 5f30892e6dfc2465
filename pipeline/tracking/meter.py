"""Sums on the device between two log lines: means of the loss and of what else steps report, rates, waits, memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .mfu import MfuEstimator

ALWAYS = ("loss", "norm", "good")
"""Sums of every run: of losses, of gradients' norms, and of steps that were applied."""


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
        self.sums = {name: torch.zeros((), device=self.accelerator.device) for name in ALWAYS}
        self.steps, self.data_wait_seconds = 0, 0.0
        self.started_at = time.perf_counter()

    def add_step(self, loss: Tensor, norm: Tensor, bad: Tensor, extras: Mapping[str, Tensor] | None = None) -> None:
        """Count an optimiser step.

        Args:
            loss: mean of this rank's samples, a scalar on the device.
            norm: of the gradient.
            bad: 1 if the step changed nothing, and enters no mean; nor does one whose gradient overflowed in fp16.
            extras: means of whatever else this rank's samples report, by name; the same names at every step, on every rank.
        """
        good = (bad == 0) & norm.isfinite()
        for name, value in {"loss": loss, "norm": norm, **(extras or {})}.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(self.sums["loss"])
            self.sums[name] += torch.where(good, value, 0)
        self.sums["good"] += good
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
        sums = self.accelerator.reduce(torch.stack(list(self.sums.values())), reduction="mean")
        return dict(zip(self.sums, sums.tolist(), strict=True))

    def restore(self, state: dict[str, float]) -> None:
        """Go on from `state`."""
        self.reset()
        for name in {**self.sums, **state}:
            value = torch.zeros_like(self.sums["loss"])
            self.sums[name] = value.fill_(state.get(name, 0.0))

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
            And each extra by its name, its mean like the loss's.
        """
        device = self.accelerator.device
        good, extras = self.sums["good"], [name for name in self.sums if name not in ALWAYS]
        means_of_rank = torch.stack([self.sums["loss"], self.sums["norm"]]) / good.clamp(min=1)
        extra_means = torch.stack([good, *(self.sums[name] / good.clamp(min=1) for name in extras)])[1:]
        other_figures = torch.tensor([self.data_wait_seconds, memory_gb(device), bad], device=device)
        found = self.accelerator.gather(torch.cat([means_of_rank, good[None], other_figures, extra_means])[None])
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
            **{name: mean if most[2] else None for name, mean in zip(extras, means[6:], strict=True)},
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
