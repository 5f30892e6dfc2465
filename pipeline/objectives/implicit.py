"""Implicit score matching: a score learnt from points alone, by the trace of its derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..flow import ScoreMatching
from .step_objective import FlowTerms, Network, StepBatch, StepLoss, StepObjective


@dataclass(frozen=True, kw_only=True)
class ExplicitScoreMatching(StepObjective):
    """The trace exactly, one product per dimension: for small samples."""

    differentiates_twice: ClassVar[bool] = True
    name: ClassVar[str] = "explicit"

    def check(self, flow: FlowTerms, shape: tuple[int, ...]) -> None:
        """Refuse another prediction, and samples of too many dimensions."""
        if flow.predict != "score":
            raise ValueError(f"flow.objective={self.name} learns a score: set flow.predict=score.")

    def loss_function(self, flow: FlowTerms) -> ScoreMatching:
        """Return the loss of flow/score_matching.py."""
        return ScoreMatching(flow.path, sliced=self.needs_probe)

    def __call__(self, network: Network, batch: StepBatch, flow: FlowTerms) -> StepLoss:
        """Return the loss of each sample."""
        loss = self.loss_function(flow)
        return StepLoss(loss(network, batch.data, batch.noise, batch.t, *batch.condition, probe=batch.probe))


@dataclass(frozen=True, kw_only=True)
class SlicedScoreMatching(ExplicitScoreMatching):
    """The trace by one random product."""

    needs_probe: ClassVar[bool] = True
    name: ClassVar[str] = "sliced"
