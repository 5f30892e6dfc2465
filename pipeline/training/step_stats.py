"""One small vector that all ranks reduce at every step: what they decide by it they decide alike.

On a CPU it is read at once. On a GPU it is read one step late, so that the
host never waits for a step that has just begun: a decision that cannot wait,
whether to apply a step at all, is taken on the device.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class StepStats(NamedTuple):
    """What all ranks know of a step."""

    step: int
    """Counted from 0."""
    loss: float
    """Mean over the global batch."""
    norm: float
    """Of the gradient, before it was clipped."""
    bad: bool
    """A loss or gradient of any rank was not finite: the step was not applied."""
    stop: bool
    """A rank was told to stop."""
    writing: bool
    """A rank still writes a checkpoint."""
    data_missing: bool = False
    """A rank cannot have the data of a step that is to come."""


class StepReducer:
    """The reduction, and what came of it.

    Args:
        device: of the losses.
        ranks: processes of the run.
        scaled: with fp16, whose scaler skips steps with an infinite gradient
            itself, and does so by intent: then only the loss is judged.
    """

    def __init__(self, device: torch.device, ranks: int, *, scaled: bool = False) -> None:
        self.device, self.ranks, self.scaled = device, ranks, scaled
        self._pending: deque[tuple[int, Tensor, Any]] = deque()

    def reduce(self, step: int, loss: Tensor, norm: Tensor, *, stop: bool, writing: bool, data_missing: bool = False) -> Tensor:
        """Reduce one step's figures; all ranks together.

        Args:
            step: counted from 0.
            loss: of this rank's samples, a scalar on the device.
            norm: of the gradient, the same on all ranks.
            stop: this rank was told to stop.
            writing: this rank still writes a checkpoint.
            data_missing: this rank cannot have the data of a step that is to come.

        Returns:
            1 if the step is bad on any rank, else 0: a scalar on the device, float32.
        """
        bad = ~torch.isfinite(loss) if self.scaled else ~(torch.isfinite(loss) & torch.isfinite(norm))
        flags = torch.tensor([stop, writing, data_missing], dtype=torch.float64).to(self.device, non_blocking=True)
        values = torch.cat([torch.stack([loss.detach().double(), norm.double(), bad.double()]), flags])
        if self.ranks > 1:
            dist.all_reduce(values)
        event = None
        read = values
        if self.device.type == "cuda":
            read = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            read.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, read, event))
        return (values[2] > 0).float()

    def read(self, *, all: bool = False) -> list[StepStats]:
        """The steps that can be read without waiting for the last one on a GPU; `all` waits for it."""
        found = []
        while len(self._pending) > (0 if all or self.device.type != "cuda" else 1):
            step, values, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, bad, stop, writing, data_missing = values.tolist()
            found.append(StepStats(step, loss / self.ranks, norm / self.ranks, bad > 0, stop > 0, writing > 0, data_missing > 0))
        return found

    def clear(self) -> None:
        """Drop what was not read: those steps are undone."""
        self._pending.clear()
