"""Training objectives by regression: what a network is asked for, as one loss per sample.

Conditional flow matching is the case `predict="velocity"`: its minimiser is
the marginal velocity, because the conditional and the marginal loss have the
same gradient. The other predictions give denoising score matching (`score`;
on VE, at its levels, NCSN) and the losses of DDPM (`noise`, `data`, `v`).

A score's error is formed as `|beta s + eps|^2`, which has a limit at beta = 0,
where the score itself has none. So every loss is finite at the ends of the
path unless its limit is infinite; `infinite_loss_times` says whether a timestep distribution
comes there.
Source: docs/mathematics.md section 3; Lipman et al., Theorem 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .linear_path import LinearPath, require_gaussian
from .parameterisation import Prediction, check_prediction_type, target
from .path import Path, interpolate
from .score_matching import ScoreMatching
from .timestep_distribution import TimestepDistribution, support
from .weighting import Weighting, build_weighting, weight


@dataclass(frozen=True)
class Objective:
    """Weighted mean square error of a prediction along a path.

    Args:
        path: a Gaussian path, or a general linear one, whose prior `noise` is
            then drawn from.
        predict: what the network is asked for.
        weighting: how errors count over time, by name or as it is; only `none` on a general path.
        gamma, sigma_data: parameters of `min_snr` and `edm`.

    Raises:
        ValueError: an unknown name; a combination that cannot be right.
    """

    path: Path | LinearPath
    predict: Prediction = "velocity"
    weighting: str | Weighting = "none"
    gamma: float = 5.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_prediction_type(self.predict)
        build_weighting(self.weighting, self.gamma, self.sigma_data)
        if isinstance(self.path, LinearPath):
            self.path.check(self.predict)
            if self.weighting != "none":
                raise ValueError(
                    f"weighting {self.weighting!r} needs the coefficients of a Gaussian path: use none on a general linear path."
                )

    def check(self, shape: tuple[int, ...]) -> None:
        """Whether data of this shape can be trained on: all can."""

    def __call__(
        self, model: Callable[..., Any], data: Tensor, noise: Tensor, t: Tensor, *condition: Any, probe: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample.

        Args:
            model: `model(x, t, *condition)` -> (B, *S); x (B, *S), t (B,).
            data: z, (B, *S).
            noise: eps, (B, *S), standard normal, or drawn from the prior.
            t: times, (B,), 0 to 1.
            condition: whatever else the model takes, each (B, ...).
            probe: unused here.

        Returns:
            (B,), mean over the other dimensions, in at least float32 also
            under autocast.

        Raises:
            ValueError: shapes that differ, times outside [0, 1], values that
                are not finite (on the CPU).
        """
        with torch.autocast(data.device.type, enabled=False):
            x, wanted, scale, factor = self._regression(data, noise, t)
        return factor * mean_squared_error(model(x, t.to(x), *condition), wanted, scale)

    def _regression(self, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return the input and the scaled target, (B, *S); that scale, None for 1; and the weight, (B,), of the scaled error."""
        prediction_type = "noise" if self.predict == "score" else self.predict
        if isinstance(self.path, LinearPath):
            x, wanted, s = self.path.interpolate_with_target(data, noise, t, prediction_type)
            factor = torch.ones_like(s)
        else:
            x, c = interpolate(self.path, data, noise, t)
            wanted, s = target(prediction_type, data, noise, c), c.b
            factor = weight(self.weighting, prediction_type, c, self.gamma, self.sigma_data)
        return (x, -wanted, s, factor.flatten()) if self.predict == "score" else (x, wanted, None, factor.flatten())


@dataclass(frozen=True)
class JointObjective:
    """One network with two outputs, velocity and score: the sum of both losses, the score's weighted by beta^2.

    Args:
        path: a Gaussian path.
        balance: factor on the score's loss, >= 0.

    Raises:
        ValueError: a path without a score; a negative balance.
    """

    path: Path
    balance: float = 1.0

    def __post_init__(self) -> None:
        require_gaussian(self.path, "a joint objective")
        if not 0 <= self.balance < float("inf"):
            raise ValueError(f"balance={self.balance} between velocity and score: finite and not negative. Use 1.")

    def check(self, shape: tuple[int, ...]) -> None:
        """Whether data of this shape can be trained on: all can."""

    def __call__(
        self, model: Callable[..., Any], data: Tensor, noise: Tensor, t: Tensor, *condition: Any, probe: Tensor | None = None
    ) -> Tensor:
        """Return the loss of each sample, (B,). As `Objective`, but `model` returns a pair (velocity, score), each (B, *S)."""
        return self.combine(*self.errors(model, data, noise, t, *condition))

    def combine(self, velocity: Tensor, score: Tensor) -> Tensor:
        """Return the loss of both errors, each (B,)."""
        return velocity + self.balance * score

    def errors(self, model: Callable[..., Any], data: Tensor, noise: Tensor, t: Tensor, *condition: Any) -> tuple[Tensor, Tensor]:
        """Return the errors of velocity and score, the score's weighted by beta^2, each (B,)."""
        with torch.autocast(data.device.type, enabled=False):
            x, c = interpolate(self.path, data, noise, t)
            velocity = target("velocity", data, noise, c)
        out = model(x, t.to(x), *condition)
        if not isinstance(out, tuple) or len(out) != 2:
            raise ValueError(
                f"a joint objective needs a pair (velocity, score) from the model, not {type(out).__name__}: give it two outputs."
            )
        return mean_squared_error(out[0], velocity), mean_squared_error(out[1], -noise, c.b)


def mean_squared_error(out: Tensor, wanted: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the mean square error of each sample, (B,), of the output times `scale`, (B, 1, ..., 1).

    Raises:
        ValueError: shapes that differ.
    """
    if out.shape != wanted.shape:
        raise ValueError(f"the model gave shape {tuple(out.shape)} for x {tuple(wanted.shape)}: a prediction has the shape of its input.")
    out = out.to(wanted.dtype)
    return ((out if scale is None else scale * out) - wanted).square().flatten(1).mean(1)


def infinite_loss_times(objective: Objective | JointObjective | ScoreMatching, distribution: TimestepDistribution) -> tuple[float, ...]:
    """Return the ends of a timestep distribution at which a loss is not finite, whatever the network gives; none as a rule.

    A distribution with a density stays off the ends (`support` of time.py), a discrete
    one may come there: t = 1 where beta = 0, t = 0 where alpha = 0.
    """
    one, ends = torch.ones(1, 1), support(distribution)

    def network(x: Tensor, t: Tensor) -> Any:
        return (0 * x, 0 * x) if isinstance(objective, JointObjective) else 0 * x

    losses = [objective(network, one, -one, torch.tensor([t]), probe=one) for t in ends]
    return tuple(t for t, loss in zip(ends, losses, strict=True) if not bool(loss.isfinite().all()))
