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


class Beat(NamedTuple):
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
    lost: bool = False
    """A rank cannot have the data of a step that is to come."""


class Pulse:
    """The reduction, and what came of it.

    Args:
        device: of the losses.
        ranks: processes of the run.
        scaled: with fp16, whose scaler skips steps with an infinite gradient
            itself, and does so by intent: then only the loss is judged.
    """

    def __init__(self, device: torch.device, ranks: int, *, scaled: bool = False) -> None:
        self.device, self.ranks, self.scaled = device, ranks, scaled
        self._sent: deque[tuple[int, Tensor, Any]] = deque()

    def beat(self, step: int, loss: Tensor, norm: Tensor, *, stop: bool, writing: bool, lost: bool = False) -> Tensor:
        """Reduce one step's figures; all ranks together.

        Args:
            step: counted from 0.
            loss: of this rank's samples, a scalar on the device.
            norm: of the gradient, the same on all ranks.
            stop: this rank was told to stop.
            writing: this rank still writes a checkpoint.
            lost: this rank cannot have the data of a step that is to come.

        Returns:
            1 if the step is bad on any rank, else 0: a scalar on the device, float32.
        """
        bad = ~torch.isfinite(loss) if self.scaled else ~(torch.isfinite(loss) & torch.isfinite(norm))
        told = torch.tensor([stop, writing, lost], dtype=torch.float64).to(self.device, non_blocking=True)
        facts = torch.cat([torch.stack([loss.detach().double(), norm.double(), bad.double()]), told])
        if self.ranks > 1:
            dist.all_reduce(facts)
        event = None
        read = facts
        if self.device.type == "cuda":
            read = torch.empty(facts.shape, dtype=facts.dtype, pin_memory=True)
            read.copy_(facts, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._sent.append((step, read, event))
        return (facts[2] > 0).float()

    def read(self, *, all: bool = False) -> list[Beat]:
        """The steps that can be read without waiting for the last one on a GPU; `all` waits for it."""
        found = []
        while len(self._sent) > (0 if all or self.device.type != "cuda" else 1):
            step, facts, event = self._sent.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, bad, stop, writing, lost = facts.tolist()
            found.append(Beat(step, loss / self.ranks, norm / self.ranks, bad > 0, stop > 0, writing > 0, lost > 0))
        return found

    def forget(self) -> None:
        """Drop what was not read: those steps are undone."""
        self._sent.clear()
