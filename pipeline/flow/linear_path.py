"""The general linear path: from any prior that can be sampled, straight or not.

`x_t = mu_t(z) + s_t x_init` with `mu_0 = 0, mu_1 = id, s_0 = 1, s_1 = 0` and
x_init from a prior of the caller's choice. Its conditional velocity is
`u_t(x | z) = dmu_t(z) + (ds_t / s_t) (x - mu_t(z))`. With a prior that is not
normal no identity leads from noise to score, so a score is refused.
Source: docs/mathematics.md section 1; Su, Building ODEs by characteristics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .counter_rng import Purpose, normal, uniform
from .parameterisation import Prediction
from .path import require_finite, widen


class Prior(Protocol):
    """Where the path starts; `is_normal` says whether it is N(0, I) and a score exists."""

    @property
    def is_normal(self) -> bool: ...

    def sample(self, seed: int, step: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """One point per sample, (B, *shape), named as in `random`."""
        ...

    def log_density(self, x: Tensor) -> Tensor:
        """Return the log-density of each sample, (B,), in nats."""
        ...


@dataclass(frozen=True)
class NormalPrior:
    """N(0, I)."""

    is_normal: bool = field(default=True, init=False)

    def sample(self, seed: int, step: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        return normal(seed, Purpose.NOISE, step, index, shape)

    def log_density(self, x: Tensor) -> Tensor:
        return (-x.square() / 2 - math.log(2 * math.pi) / 2).flatten(1).sum(1)


@dataclass(frozen=True)
class UniformPrior:
    """Every coordinate uniform on [low, high], plus logistic noise of scale `softness`.

    With soft edges every point has a density, so that a marginal field is
    defined also where the rounding of a solver carries x out of the supports.
    """

    low: float = 0.0
    high: float = 1.0
    softness: float = 0.0
    is_normal: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not (-math.inf < self.low < self.high < math.inf and 0 <= self.softness < math.inf):
            raise ValueError(
                f"uniform prior on [{self.low}, {self.high}], softness {self.softness}: low < high, softness >= 0, all finite."
            )

    def sample(self, seed: int, step: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        u, edge = uniform(seed, Purpose.NOISE, step, index, (2, *shape)).unbind(1)
        return (self.low + (self.high - self.low) * u + self.softness * torch.logit(edge)).float()

    def log_density(self, x: Tensor) -> Tensor:
        above, below, width = x - self.low, self.high - x, self.high - self.low
        if not self.softness:
            inside = ((above >= 0) & (below >= 0)).flatten(1).all(1)
            return torch.where(inside, x.new_tensor(-x[0].numel() * math.log(width)), -torch.inf)
        # sigmoid(u) - sigmoid(v) = sigmoid(u) sigmoid(-v) (1 - exp(v - u))
        edges = torch.nn.functional.logsigmoid(above / self.softness) + torch.nn.functional.logsigmoid(below / self.softness)
        return (edges + math.log(-math.expm1(-width / self.softness) / width)).flatten(1).sum(1)


def straight_mean(t: Tensor, z: Tensor) -> Tensor:
    """`mu_t(z) = t z`."""
    return t * z


def straight_scale(t: Tensor) -> Tensor:
    """`s_t = 1 - t`."""
    return 1 - t


@dataclass(frozen=True)
class LinearPath:
    """`x_t = mu_t(z) + s_t x_init`; the default is the straight line from a point of the prior to a datum.

    Args:
        prior: of x_init.
        mean: `mean(t, z)`, t (B, 1, ..., 1), z (B, *S); 0 at t = 0 and z at t = 1.
        scale: `scale(t)`; 1 at t = 0 and 0 at t = 1. Both differentiable in t.
    """

    prior: Prior = field(default_factory=NormalPrior)
    mean: Callable[[Tensor, Tensor], Tensor] = straight_mean
    scale: Callable[[Tensor], Tensor] = straight_scale

    def _parts(self, data: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mu, s and their time derivatives, by forward-mode differentiation."""
        wide = widen(t, data)
        one = torch.ones_like(wide)
        mu, dmu = torch.func.jvp(lambda time: self.mean(time, data), (wide,), (one,))[:2]
        s, ds = torch.func.jvp(self.scale, (wide,), (one,))[:2]
        return mu, s, dmu, ds

    def interpolate_with_target(
        self, data: Tensor, initial: Tensor, t: Tensor, prediction_type: Prediction = "velocity"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The point between a datum and a point of the prior, and what a network is asked for there.

        Args:
            data, initial: z and x_init, (B, *S).
            t: times, (B,), 0 to 1.
            prediction_type: `velocity`, `data`, `noise` (that is x_init) or, with a normal prior, `score`.

        Returns:
            x_t and the target, (B, *S); s_t, (B, 1, ..., 1).

        Raises:
            ValueError: shapes, times; a score with a prior that is not normal.
        """
        self.check(prediction_type)
        if data.shape != initial.shape:
            raise ValueError(f"data {tuple(data.shape)} and initial {tuple(initial.shape)} differ: draw one point of the prior per datum.")
        require_finite("data", data)
        require_finite("initial", initial)
        mu, s, dmu, ds = self._parts(data, t)
        targets = {"velocity": lambda: dmu + ds * initial, "data": lambda: data, "noise": lambda: initial, "score": lambda: -initial / s}
        return mu + s * initial, targets[prediction_type](), s

    def conditional_velocity(self, x: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """`u_t(x | z)`, (B, *S); singular at t = 1, where s = 0."""
        mu, s, dmu, ds = self._parts(data, t)
        return dmu + ds / s * (x - mu)

    def conditional_score(self, x: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """`grad log p_t(x | z) = -(x - mu) / s^2`, (B, *S); a ValueError unless the prior is normal."""
        self.check("score")
        mu, s, _, _ = self._parts(data, t)
        return -(x - mu) / s**2

    def check(self, prediction_type: Prediction) -> None:
        """A ValueError for a prediction this path cannot have."""
        if prediction_type == "score" and not self.prior.is_normal:
            raise ValueError(
                f"score with the prior {self.prior}: it follows from the noise only where the prior is normal. Predict the velocity."
            )
        if prediction_type not in ("velocity", "data", "noise", "score"):
            raise ValueError(f"prediction {prediction_type!r} on a general linear path: choose velocity, data, noise or score.")


def require_gaussian(path: object, what: str) -> None:
    """A ValueError when a Gaussian path is needed and a general one is given."""
    if isinstance(path, LinearPath):
        raise ValueError(f"{what} needs the score of a Gaussian path, not a general linear one. Use Objective for its velocity.")


def empirical_velocity_field(path: LinearPath, points: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The marginal velocity of a finite data set, exactly: conditional velocities averaged over the posterior.

    `u_t(x) = sum_k r_k u_t(x | z_k)`, `r_k ∝ p_init((x - mu_t(z_k)) / s_t)`.

    Args:
        path: a general linear path.
        points: the data set, (K, *S); repeat a point to weight it.

    Returns:
        A field of x (B, *S) and t (B,), 0 <= t < 1; not a number where no
        datum can have led to x.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        count, batch = len(points), len(x)
        repeated_x, repeated_t = x.repeat_interleave(count, 0), t.repeat_interleave(count)
        repeated_z = points.to(x).repeat(batch, *[1] * (x.ndim - 1))
        mu, s, dmu, ds = path._parts(repeated_z, repeated_t)
        start = (repeated_x - mu) / s
        weight = torch.softmax(path.prior.log_density(start).reshape(batch, count), dim=1)
        conditional_velocities = (dmu + ds * start).reshape(batch, count, *x.shape[1:])
        return (weight.reshape(batch, count, *[1] * (x.ndim - 1)) * conditional_velocities).sum(1)

    return velocity
