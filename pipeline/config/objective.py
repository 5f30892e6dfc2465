"""From a recipe's names to the mathematics: what is drawn for a sample, and what its loss is.

Combinations that cannot be right are refused here, before training begins.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..flow import (
    Condition,
    Path,
    Prior,
    Purpose,
    TimestepDistribution,
    UniformPrior,
    couple_by_optimal_transport,
    infinite_loss_times,
    normal,
    precondition,
    rademacher,
    sample_times,
    uniform,
)
from ..objectives.regularisers import ObservedNetwork, Regulariser, active_regularisers, add_regularisers
from ..objectives.step_objective import FlowTerms, LossFunction, StepBatch, StepLoss, StepObjective
from ..objectives.table import OBJECTIVES
from .flow import FLAT_OBJECTIVES, FlowConfig


class RandomInputs(NamedTuple):
    """The random numbers of one micro-batch: functions of (seed, step, place in the global batch)."""

    noise: Tensor
    """(B, *S), from the prior."""
    t: Tensor
    """(B,), float32."""
    drop: Tensor
    """(B,), uniform: chance of losing the condition."""
    probe: Tensor | None
    """(B, *S), signs, for sliced score matching."""


@dataclass(frozen=True)
class TrainingObjective:
    """A recipe's section `flow` as mathematics.

    Args:
        flow: the section.
        shape: of one sample as the network sees it, S.
        batch_size: of the global batch, to stratify times over.

    Raises:
        ValueError: a combination that cannot be right, with the reason.
    """

    flow: FlowConfig
    shape: tuple[int, ...]
    batch_size: int

    def __post_init__(self) -> None:
        flow = self.flow
        if self.preconditioned and flow.predict != "data":
            raise ValueError(
                f"flow.predict={flow.predict} with Karras preconditioning (flow.path=edm, or flow.precondition): the scaled network "
                f"predicts data. Set flow.predict=data and flow.weighting=edm."
            )
        if flow.prior != "normal" and (flow.path != "condot" or self.preconditioned):
            raise ValueError(f"flow.prior={flow.prior} goes with the straight line: set flow.path=condot and no precondition.")
        self.objective.check(self.terms, self.shape)
        if flow.coupling != "independent" and flow.coupling_group < 2:
            raise ValueError(f"flow.coupling_group={flow.coupling_group}: an assignment is among at least two images. Use 32.")
        active_regularisers(flow.regularisers)
        loss_function = self.loss_function
        if loss_function is None:
            return
        loss_function.check(self.shape)
        for t in infinite_loss_times(loss_function, self.timestep_distribution):
            raise ValueError(
                f"flow.time={flow.time} trains at t={t:g}, where the loss of flow.predict={flow.predict} with flow.weighting="
                f"{flow.weighting} on flow.path={flow.path} is infinite. Set flow.time=uniform, which stays inside, or {_remedy(flow)}."
            )

    def check_text_conditioning(self) -> None:
        """Raises ValueError for a recipe that goes with classes only."""
        if self.flow.coupling != "independent":
            raise ValueError(f"flow.coupling={self.flow.coupling} moves noise within a class, and every caption is one: set independent.")

    def check_gradient_checkpointing(self, gradient_checkpointing: bool) -> None:
        """Raises ValueError where blocks are computed again in the backward pass of a loss that needs an attention of its own."""
        if gradient_checkpointing and self.differentiates_twice:
            raise ValueError(
                f"flow.objective={self.flow.objective} with model.gradient_checkpointing=true: the loss differentiates twice, through an "
                f"attention that the second pass would not take. Set gradient_checkpointing=false and more accumulation."
            )

    @property
    def preconditioned(self) -> bool:
        """Whether the network is scaled the Karras way; always on the path EDM."""
        return self.flow.precondition or self.flow.path == "edm"

    @property
    def path(self) -> Path:
        """The Gaussian path; with a uniform prior, the coefficients of the straight line."""
        return self.flow.build_path()

    @property
    def prior(self) -> Prior | None:
        """Where the path starts, unless at N(0, I)."""
        return build_prior(self.flow)

    @property
    def timestep_distribution(self) -> TimestepDistribution:
        """Where on the path the network is trained."""
        return self.flow.build_timestep_distribution()

    @property
    def terms(self) -> FlowTerms:
        """What an objective is told of the recipe."""
        flow = self.flow
        return FlowTerms(self.path, flow.predict, flow.build_weighting(), flow.min_snr_gamma, flow.sigma_data, self.prior)

    @property
    def objective(self) -> StepObjective:
        """What a step is trained for."""
        return build_objective(self.flow)

    @property
    def loss_function(self) -> LossFunction | None:
        """The objective's loss as mathematics; None where it cannot be examined at the ends of the path."""
        return self.objective.loss_function(self.terms)

    @property
    def regularisers(self) -> dict[str, Regulariser]:
        """What is added to it, by name."""
        return active_regularisers(self.flow.regularisers)

    @property
    def differentiates_twice(self) -> bool:
        """Whether the loss holds a derivative of the network, which the gradient then differentiates again."""
        return self.objective.differentiates_twice or any(one.differentiates_twice for one in self.regularisers.values())

    def build_predictor(self, model: Callable[..., Tensor]) -> Callable[..., Any]:
        """Return what the recipe makes of a bare network, `(x, t, labels)` -> the prediction, or a pair of them."""
        return build_predictor(model, self.flow)

    def draw_random_inputs(self, seed: int, step: int, batch_indices: Tensor, shape: tuple[int, ...] | None = None) -> RandomInputs:
        """Noise, times, chances and probes of the samples at `batch_indices`, (B,), of a global batch; of another shape S if given."""
        shape = shape or self.shape
        return RandomInputs(
            normal(seed, Purpose.NOISE, step, batch_indices, shape)
            if self.prior is None
            else self.prior.sample(seed, step, batch_indices, shape),
            sample_times(self.timestep_distribution, seed, step, batch_indices, self.batch_size if self.flow.stratified else None).float(),
            uniform(seed, Purpose.CONDITION_DROP, step, batch_indices),
            rademacher(seed, Purpose.PROBE, step, batch_indices, shape) if self.objective.needs_probe else None,
        )

    def __call__(
        self,
        model: Callable[..., Tensor],
        data: Tensor,
        draws: RandomInputs,
        *condition: Condition,
        seed: int = 0,
        step: int = 0,
        indices: Tensor | None = None,
    ) -> StepLoss:
        """Return the loss of each sample, with the regularisers, and what is logged beside it.

        Args:
            model: the bare network, as it is wrapped for training.
            data: z, (B, *S).
            draws: of these samples.
            condition: what else the network takes, each (B, ...): labels or text, null where it is dropped; sizes.
            seed, step, indices: of the draws, for a term that wants more random numbers; places in the global batch, (B,).
        """
        noise = self.couple_noise(data, draws.noise, condition[0])
        network, regularisers, terms = self.build_predictor(model), self.regularisers, self.terms
        batch = StepBatch(data, noise, draws.t, condition, draws.probe, seed, step, indices)
        # the fast attentions have no second derivative
        with sdpa_kernel(SDPBackend.MATH) if self.differentiates_twice else nullcontext():
            if not regularisers:
                return self.objective(network, batch, terms)
            observed = ObservedNetwork(network, model)
            step_loss = self.objective(observed, batch, terms)
            return add_regularisers(step_loss, self.flow.objective, regularisers, observed, batch, terms)

    def losses(self, model: Callable[..., Tensor], data: Tensor, draws: RandomInputs, *condition: Condition, **place: Any) -> Tensor:
        """Return the loss of each sample alone, (B,); `place` as above."""
        return self(model, data, draws, *condition, **place).loss

    def couple_noise(self, data: Tensor, noise: Tensor, labels: Condition) -> Tensor:
        """The noise of each datum under the recipe's coupling: in groups of fixed places, so that ranks do not change it."""
        size = self.flow.coupling_group
        if self.flow.coupling == "independent":
            return noise
        if len(data) % size:
            raise ValueError(f"flow.coupling_group={size} does not divide the micro-batch of {len(data)} images: use a divisor of it.")
        groups = zip(data.split(size), noise.split(size), labels.split(size), strict=True)
        return torch.cat([couple_by_optimal_transport(z, eps, y) for z, eps, y in groups])


def _remedy(flow: FlowConfig) -> str:
    """Return which other field makes the loss finite at the ends of the path."""
    return (
        "flow.weighting=none" if flow.weighting != "none" and not (flow.path == "vp" and flow.predict == "velocity") else "flow.predict=v"
    )


def build_objective(flow: FlowConfig) -> StepObjective:
    """Return what a step is trained for, with the options that the recipe gives."""
    if flow.objective_options is not None:
        chosen: StepObjective = flow.objective_options
        return chosen
    given = {option: getattr(flow, older) for option, older in FLAT_OBJECTIVES.get(flow.objective, {}).items()}
    objective: StepObjective = OBJECTIVES.lookup(flow.objective)(**given)
    return objective


def build_prior(flow: FlowConfig) -> Prior | None:
    """The prior of a recipe, if it is not normal: uniform, of unit variance."""
    return UniformPrior(-(3**0.5), 3**0.5) if flow.prior == "uniform" else None


def build_predictor(model: Callable[..., Tensor], flow: FlowConfig) -> Callable[..., Any]:
    """Return a bare network as a predictor: itself, scaled the Karras way, or its two halves as a pair (velocity, score)."""
    if flow.objective == "joint":
        return lambda x, t, *condition: tuple(model(x, t, *condition).chunk(2, dim=1))
    wanted = flow.precondition or flow.path == "edm"
    return precondition(model, flow.build_path(), flow.sigma_data) if wanted else model
