"""What a call of `condot.train` leaves: the run's folder, and how far it came."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condot.pipeline.tracking.jsonl import read_lines


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A run after training, finished or stopped; the same call goes on with what was stopped."""

    folder: Path
    """Checkpoints, metrics.jsonl, samples, export."""
    step: int
    """Optimiser steps done."""
    exit_status: int
    """As the command's: 0 finished, 128 + n stopped by signal n, 3 diverged; status.json has the reason."""
    checkpoint: Path | None
    """The newest."""
    export: Path | None
    """The folder that diffusers loads; None where the recipe or an early stop left it out."""

    @property
    def finished(self) -> bool:
        """Whether all steps of the recipe are done."""
        return self.exit_status == 0

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, each a mapping: `step`, `images`, `loss`, `lr`, ..."""
        return read_lines(self.folder / "metrics.jsonl")
