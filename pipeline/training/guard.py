"""What all ranks make of a step: one is skipped, several in a row or a spike lead back to the last good checkpoint, past its data.

A step whose loss or gradient is not finite on any rank is applied on none.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from ..config.schema import GuardConfig
from .step_stats import StepStats

MAX_OVERFLOWS = 40
"""Steps in a row: fp16's scaler, which begins at 2^16 and halves, is then far below any gradient that it could help."""


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
