"""Trajectories of any shape: a bundle of curves from the prior to each datum, and the densities it carries.

A caller gives `x_t = phi_t(x_init | z)`, invertible in x_init for t < 1. Each
curve keeps its x_init, so that, as a function of (t, x), x_init is constant
along the curves (they are characteristics of the continuity equation), and

    u_t(x | z) = d/dt phi_t(x_init | z),     x_init = phi_t^{-1}(x | z)
    p_t(x | z) = p_init(x_init) / |det d phi_t / d x_init|

No integral of a divergence is left: along a curve it is the logarithm of the
Jacobian. Conditional flow matching needs neither the inverse nor the Jacobian,
only the curves; both are needed for exact densities and marginal fields. Where
no inverse is given it is found by Newton's method, so `linear.py`'s straight
lines are the case `phi = mu_t(z) + s_t x_init`, with Jacobian s_t^D.
Source: Su, Building ODEs by characteristics, eq. 6-12 and 24 (its x_0 is our
z, its x_T our x_init, its time runs from the data).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .divergence import check_exact_divergence
from .linear_path import NormalPrior, Prior
from .objective import mean_squared_error
from .path import require_finite, widen

Curve = Callable[[Tensor, Tensor, Tensor], Tensor]  # of t (B, 1, ..., 1), x_init and z, (B, *S), sample by sample -> x_t, (B, *S)
NEWTON_STEPS = 50
"""Newton steps for an inverse, at most; each is halved until it comes nearer."""


@dataclass(frozen=True)
class Trajectory:
    """Curves `x_t = phi(t, x_init, z)` from a prior to data.

    Args:
        phi: differentiable in t and x_init; x_init at t = 0, z at t = 1; at 0 <= t < 1 invertible in x_init.
        prior: of x_init.
        inverse: `inverse(t, x, z)` -> x_init; None for Newton's method, in at most 64 dimensions.
    """

    phi: Curve
    prior: Prior = field(default_factory=NormalPrior)
    inverse: Curve | None = None

    def interpolate_with_target(self, data: Tensor, initial: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the point x_t on the curve and the velocity there, (B, *S) each: what flow matching regresses on.

        Args:
            data, initial: z and x_init, (B, *S).
            t: (B,), 0 to 1.

        Raises:
            ValueError: shapes that differ, values that are not finite, times outside [0, 1].
        """
        if data.shape != initial.shape:
            raise ValueError(f"data {tuple(data.shape)} and initial {tuple(initial.shape)} differ: draw one point of the prior per datum.")
        require_finite("data", data)
        require_finite("initial", initial)
        wide = widen(t, data)
        x, velocity = torch.func.jvp(lambda time: self.phi(time, initial, data), (wide,), (torch.ones_like(wide),))[:2]
        return x, velocity

    def initial_point(self, x: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """Return x_init of the curve to each datum that passes through x at t < 1, (B, *S).

        Raises:
            ValueError: too many dimensions for Newton's method, or an inverse that it does not find.
        """
        wide = widen(t, x)
        if self.inverse is not None:
            return self.inverse(wide, x, data)
        check_exact_divergence(tuple(x.shape[1:]), "Give the trajectory its inverse.")
        guess, accuracy = x, 1e3 * torch.finfo(x.dtype).eps
        for _ in range(NEWTON_STEPS):
            residual = (self.phi(wide, guess, data) - x).flatten(1)
            step: Tensor = torch.linalg.solve_ex(self._jacobian(guess, data, wide), residual)[0].reshape(x.shape)
            if bool((step.flatten(1).norm(dim=1) <= accuracy * (1 + guess.flatten(1).norm(dim=1))).all()):
                return guess - step
            damping = torch.ones_like(wide)
            for _ in range(NEWTON_STEPS // 5):  # halve the step of each sample until it comes nearer
                nearer = (self.phi(wide, guess - damping * step, data) - x).flatten(1).norm(dim=1) < residual.norm(dim=1)
                if bool(nearer.all()):
                    break
                damping = torch.where(nearer.reshape(wide.shape), damping, damping / 2)
            guess = guess - damping * step
        raise ValueError(
            f"no x_init found whose curve passes through x at t={t.min().item():g} to {t.max().item():g}: "
            f"is phi invertible there? Give the trajectory its inverse."
        )

    def _jacobian(self, initial: Tensor, data: Tensor, wide: Tensor) -> Tensor:
        """Return d phi / d x_init of each sample, (B, D, D)."""
        size = initial[0].numel()

        def moved(one: Tensor, datum: Tensor, time: Tensor) -> Tensor:
            return self.phi(time[None], one[None], datum[None])[0]

        jacobian: Tensor = torch.func.vmap(torch.func.jacfwd(moved))(initial, data, wide)
        return jacobian.reshape(-1, size, size)

    def conditional_velocity(self, x: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """Return `u_t(x | z)`, (B, *S), at t < 1."""
        return self.interpolate_with_target(data, self.initial_point(x, data, t), t)[1]

    def conditional_log_density(self, x: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """Return `log p_t(x | z)`, (B,), nats, at t < 1: the prior's, less the logarithm of the Jacobian. At most 64 dimensions."""
        check_exact_divergence(tuple(x.shape[1:]), "The determinant has no estimate here.")
        initial = self.initial_point(x, data, t)
        log_volume: Tensor = torch.linalg.slogdet(self._jacobian(initial, data, widen(t, x)))[1]
        return self.prior.log_density(initial) - log_volume


@dataclass(frozen=True)
class TrajectoryMatching:
    """Conditional flow matching along a trajectory; its minimiser is the marginal velocity, as along any other (Su, eq. 15)."""

    trajectory: Trajectory

    def __call__(self, model: Callable[..., Any], data: Tensor, initial: Tensor, t: Tensor, *condition: Any) -> Tensor:
        """Return the loss of each sample, (B,).

        Args:
            model: `model(x, t, *condition)` -> velocity, (B, *S).
            data, initial, t: as in `Trajectory.interpolate_with_target`; `scale_initial_noise` drawn from the trajectory's prior.
            condition: whatever else the model takes.
        """
        with torch.autocast(data.device.type, enabled=False):
            x, velocity = self.trajectory.interpolate_with_target(data, initial, t)
        return mean_squared_error(model(x, t.to(x), *condition), velocity)


def empirical_marginal(trajectory: Trajectory, points: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the marginal velocity and log-density of a finite data set, exactly.

    `p_t(x) = mean_k p_t(x | z_k)` and `u_t(x) = sum_k r_k u_t(x | z_k)` with
    `r_k` in proportion to `p_t(x | z_k)`, Jacobian and all.

    Args:
        trajectory: the curves.
        points: the data set, (K, *S); repeat a point to weight it.
        x: (B, *S).
        t: (B,), 0 <= t < 1.

    Returns:
        u_t(x), (B, *S), not a number where no curve leads to x; log p_t(x), (B,), nats.
    """
    count, batch = len(points), len(x)
    repeated_x, repeated_t = x.repeat_interleave(count, 0), t.repeat_interleave(count)
    repeated_z = points.to(x).repeat(batch, *[1] * (x.ndim - 1))
    initial = trajectory.initial_point(repeated_x, repeated_z, repeated_t)
    log_jacobian = torch.linalg.slogdet(trajectory._jacobian(initial, repeated_z, widen(repeated_t, repeated_x)))[1]
    logs = (trajectory.prior.log_density(initial) - log_jacobian).reshape(batch, count)
    conditional_velocities = trajectory.interpolate_with_target(repeated_z, initial, repeated_t)[1].reshape(batch, count, *x.shape[1:])
    damping = torch.softmax(logs, dim=1).reshape(batch, count, *[1] * (x.ndim - 1))
    return (damping * conditional_velocities).sum(1), torch.logsumexp(logs, dim=1) - torch.log(torch.tensor(float(count)))
