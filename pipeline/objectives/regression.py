"""Regression: the mean square error of what the network predicts, or of two outputs at once."""

from __future__ import annotations

from dataclasses import dataclass

from ..flow import JointObjective, Objective
from .step_objective import FlowTerms, Network, StepBatch, StepLoss, StepObjective


@dataclass(frozen=True, kw_only=True)
class Regression(StepObjective):
    """The error of `flow.predict`, weighted by `flow.weighting`: flow matching, DDPM, denoising score matching."""

    def loss_function(self, flow: FlowTerms) -> Objective:
        """Return the loss of flow/objective.py."""
        return Objective(flow.training_path, flow.predict, flow.weighting, flow.min_snr_gamma, flow.sigma_data)

    def __call__(self, network: Network, batch: StepBatch, flow: FlowTerms) -> StepLoss:
        """Return the error of each sample."""
        return StepLoss(self.loss_function(flow)(network, batch.data, batch.noise, batch.t, *batch.condition))


@dataclass(frozen=True, kw_only=True)
class Joint(StepObjective):
    """Velocity and score, two outputs of one network; both errors are logged."""

    balance: float = 1.0  # factor on the score's loss, which is weighted by beta^2

    def check(self, flow: FlowTerms, shape: tuple[int, ...]) -> None:
        """Refuse another prediction, weighting or prior."""
        if flow.predict != "velocity" or flow.weighting != "none" or flow.prior is not None:
            prior = "normal" if flow.prior is None else type(flow.prior).__name__.removesuffix("Prior").lower()
            raise ValueError(
                f"flow.objective=joint with flow.predict={flow.predict}, flow.weighting={flow.weighting}, flow.prior={prior}: "
                f"it learns a velocity and a score from normal noise. Set flow.predict=velocity, flow.weighting=none, flow.prior=normal."
            )

    def loss_function(self, flow: FlowTerms) -> JointObjective:
        """Return the loss of flow/objective.py."""
        return JointObjective(flow.path, self.balance)

    def __call__(self, network: Network, batch: StepBatch, flow: FlowTerms) -> StepLoss:
        """Return the sum of both errors."""
        loss = self.loss_function(flow)
        velocity, score = loss.errors(network, batch.data, batch.noise, batch.t, *batch.condition)
        return StepLoss(loss.combine(velocity, score), {"loss/velocity": velocity, "loss/score": score})
