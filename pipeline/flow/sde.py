"""SDE solvers: the same marginals as the ODE, for any noise added on the way.

For every `sigma_t >= 0`, chosen after training,
`dX = [u + sigma_t^2 / 2 score] dt + sigma_t dW` has the marginals of the ODE.
With one evaluation a step both integrators have the form

    x' = P x + Q u + S score + R xi

with numbers that follow from the path and the grid alone. They are computed
before the first evaluation, in float64 on the CPU; so a step is a few
additions and an accelerator is never waited for. The last step adds no noise.
Source: docs/mathematics.md section 4; Ma et al., SiT, section 2;
Song et al., Score-Based Generative Modeling through SDEs, eq. 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .field import Field, velocity_and_score
from .parameterisation import conversion_coefficients
from .path import Coefficients, Path
from .solver import Solution, StepCallback, check_solution, check_start, expand_time
from .time_grid import intervals

DiffusionCoefficient = Callable[[Tensor, Coefficients], Tensor]  # of (t, coefficients there), of t's shape, >= 0
NoiseFunction = Callable[[int], Tensor]  # of the step's number, standard normal, (B, *S)

DIFFUSION_COEFFICIENTS: dict[str, DiffusionCoefficient] = {
    "zero": lambda t, c: torch.zeros_like(t),
    "constant": lambda t, c: torch.ones_like(t),
    "noise": lambda t, c: c.b,
    "forward": lambda t, c: torch.sqrt(2 * (c.b**2 * c.da / c.a - c.db * c.b)),
}


@dataclass(frozen=True)
class NamedDiffusion:
    """A named diffusion coefficient, `scale` times DIFFUSION_COEFFICIENTS[name]; called with (t, coefficients)."""

    name: str
    scale: float = 1.0

    def __call__(self, t: Tensor, c: Coefficients) -> Tensor:
        return self.scale * DIFFUSION_COEFFICIENTS[self.name](t, c) if self.scale else torch.zeros_like(t)


@dataclass(frozen=True)
class TabulatedDiffusion:
    """A diffusion coefficient by its values, evenly from t = 0 to 1, linear between, times `scale`; called with (t, coefficients)."""

    values: tuple[float, ...]
    scale: float = 1.0

    def __call__(self, t: Tensor, c: Coefficients) -> Tensor:
        values, place = self.scale * torch.tensor(self.values, dtype=t.dtype, device=t.device), t * (len(self.values) - 1)
        left = place.floor().long().clamp(0, len(self.values) - 2)
        return torch.lerp(values[left], values[left + 1], place - left)


def diffusion_coefficient(sigma: str | Sequence[float] | DiffusionCoefficient, scale: float = 1.0) -> DiffusionCoefficient:
    """Return a diffusion coefficient sigma_t.

    Args:
        sigma: `zero` (the ODE), `constant`, `noise` (in proportion to beta) or
            `forward` (`sqrt(2 (b^2 da / a - db b))`, the reverse-time SDE of
            the forward process; infinite where alpha = 0); or values, evenly
            from t = 0 to 1, as FlowSDEScheduler takes them; or any function of (t, coefficients).
        scale: a factor, >= 0.

    Raises:
        ValueError: an unknown name, fewer than two values, or one of them or a scale that is negative or not finite.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"sigma_scale={scale}: the scale of a diffusion coefficient is finite and not negative.")
    if callable(sigma):
        return sigma if scale == 1 else lambda t, c: scale * sigma(t, c)
    if not isinstance(sigma, str):
        if len(sigma) < 2 or not all(0 <= value < math.inf for value in sigma):
            raise ValueError(
                f"sigma_t values {tuple(sigma)}: two or more, finite, not negative, evenly from t = 0 (noise) to t = 1 (data). Try 1 1 0."
            )
        return TabulatedDiffusion(tuple(sigma), scale)
    if sigma not in DIFFUSION_COEFFICIENTS:
        raise ValueError(f"sigma_t={sigma!r} is unknown: choose one of {', '.join(DIFFUSION_COEFFICIENTS)}.")
    return NamedDiffusion(sigma, scale)


def evaluate_diffusion(sigma: DiffusionCoefficient, path: Path, t: Tensor) -> Tensor:
    """sigma at times of any shape, float64; a ValueError where it is negative or not finite."""
    t = t.double().cpu()
    values = torch.as_tensor(sigma(t, path(t)), dtype=torch.float64).broadcast_to(t.shape)
    bad = ~((values >= 0) & (values < math.inf))
    if bool(bad.any()):
        raise ValueError(
            f"sigma_t={values[bad][0].item()} at t={t[bad][0].item():.6g}: a diffusion coefficient is finite and not negative. "
            f"Start the grid later, take another, or the exponential solver for `forward`."
        )
    return values


def forward_sde_coefficients(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """Drift factor f and squared diffusion g^2 of the process `dx = f x ds + g dw`, s = 1 - t, that makes the path's noise.

    `f = dlog(alpha) / ds`, `g^2 = d(beta^2) / ds - 2 f beta^2`. Its reverse,
    `dx = (f x - g^2 score) ds + g dw` run from s = 1 to 0, is the SDE here
    with the coefficient `forward`.

    Args:
        t: any shape, in (0, 1); f is infinite where alpha = 0.
    """
    c = path(t)
    f = -c.da / c.a
    return f, -2 * c.b * c.db - 2 * f * c.b**2


# Gauss's rule of 8 points on [-1, 1], which is symmetric: the points above 0, and their weights.
GAUSS_NODES = torch.tensor([0.1834346424956498, 0.5255324099163290, 0.7966664774136267, 0.9602898564975363], dtype=torch.float64)
GAUSS_WEIGHTS = torch.tensor([0.3626837833783620, 0.3137066458778873, 0.2223810344533745, 0.1012285362903763], dtype=torch.float64)


def noise_kept_between(sigma: DiffusionCoefficient, path: Path, start: Tensor, end: Tensor) -> Tensor:
    """Return `exp(-1/2 integral of sigma^2 / beta^2)` from `start` to `end`, float64 times of one shape; see `noise_kept_per_step`."""
    if isinstance(sigma, NamedDiffusion) and sigma.name == "forward" and sigma.scale:
        return torch.exp(-(sigma.scale**2) * (path.log_snr(end) - path.log_snr(start)) / 2)
    middle, half = (end + start)[..., None] / 2, (end - start)[..., None] / 2
    inside = middle + half * torch.cat([-GAUSS_NODES, GAUSS_NODES])
    rate = (evaluate_diffusion(sigma, path, inside) / path(inside).b) ** 2
    return torch.exp(-(rate * torch.cat([GAUSS_WEIGHTS, GAUSS_WEIGHTS])).sum(-1) * half[..., 0] / 2)


def noise_kept_per_step(sigma: DiffusionCoefficient, path: Path, times: Tensor) -> Tensor:
    """`exp(-1/2 integral of sigma^2 / beta^2)` over each interval: how much of the old noise is kept.

    Args:
        times: grid, (n + 1,); sigma / beta is finite there.

    Returns:
        (n,), float64, 0 to 1. For `forward` the integral is the change of the
        log signal-to-noise ratio; else eight-point Gauss quadrature.
    """
    times = times.double().cpu()
    if not (isinstance(sigma, NamedDiffusion) and sigma.name == "forward" and sigma.scale):
        evaluate_diffusion(sigma, path, times[:-1])
    return noise_kept_between(sigma, path, times[:-1], times[1:])


class StepCoefficients(NamedTuple):
    """The numbers P, Q, S, R of each step, each (n,), float64."""

    x: Tensor
    velocity: Tensor
    score: Tensor
    noise: Tensor


def _append_noiseless_step(values: Tensor, last_value: float) -> Tensor:
    """The values of all steps but the last, and what makes the last one noise-free."""
    return torch.cat([values, values.new_tensor([last_value])])


def euler_maruyama_coefficients(path: Path, times: Tensor, sigma: DiffusionCoefficient) -> StepCoefficients:
    """Euler and Maruyama's step: `x' = x + h (u + sigma^2 / 2 score) + sqrt(h) sigma xi`."""
    h = times.diff()
    g = _append_noiseless_step(evaluate_diffusion(sigma, path, times[:-2]), 0.0)
    return StepCoefficients(torch.ones_like(h), h, h * g**2 / 2, torch.sqrt(h) * g)


def exponential_coefficients(path: Path, times: Tensor, sigma: DiffusionCoefficient) -> StepCoefficients:
    """The exact solution of a step over which the data prediction is frozen.

    Then `x - alpha z` obeys a linear SDE: of the old noise stays
    `beta_t keep / beta_s`, and new noise fills up to beta_t,

        x' = alpha_t z + beta_t (keep eps + sqrt(1 - keep^2) xi).

    Written here as the step of the ODE (keep = 1, DDIM; on CondOT Euler's)
    plus what the score and the noise change.
    """
    now, then = path(times[:-1]), path(times[1:])
    keep = _append_noiseless_step(noise_kept_per_step(sigma, path, times[:-1]), 1.0)
    data, eps = conversion_coefficients("velocity", "data", now), conversion_coefficients("velocity", "noise", now)
    return StepCoefficients(
        then.a * data[0] + then.b * eps[0],
        then.a * data[1] + then.b * eps[1],
        then.b * now.b * (1 - keep),
        then.b * torch.sqrt(1 - keep**2),
    )


def integrate_steps(
    step_coefficients: StepCoefficients,
    field: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    noise: NoiseFunction,
    step_callback: StepCallback | None,
    extrapolation_by_step: Tensor | None = None,
) -> Solution:
    """Take the planned steps; the score comes from the field, or else from its velocity.

    Args:
        extrapolation_by_step: of each step, what it adds of the change of the data prediction since the step before, (n,).
    """
    now = path(times[:-1])
    x_factor, velocity_factor = (
        torch.where(step_coefficients.score == 0, 0.0, step_coefficients.score * part)
        for part in conversion_coefficients("velocity", "score", now)
    )
    merged = torch.stack([step_coefficients.x + x_factor, step_coefficients.velocity + velocity_factor], 1).tolist()
    learned = torch.stack(list(step_coefficients), 1).tolist()
    data = torch.stack(conversion_coefficients("velocity", "data", now), 1).tolist()
    extrapolation_weights = [] if extrapolation_by_step is None else extrapolation_by_step.tolist()
    steps, x, before = intervals(times), check_start(x), None
    for k, (s, t) in enumerate(steps):
        velocity, score = velocity_and_score(field(x, expand_time(s, x)))
        p, q = merged[k] if score is None else learned[k][:2]
        z = None if not extrapolation_weights else torch.add(x * data[k][0], velocity, alpha=data[k][1])
        x = torch.add(x * p, velocity, alpha=q)
        if z is not None:
            x, before = x if before is None else torch.add(x, z - before, alpha=extrapolation_weights[k]), z
        if score is not None and learned[k][2]:
            x = torch.add(x, score, alpha=learned[k][2])
        if learned[k][3]:
            x = torch.add(x, noise(k), alpha=learned[k][3])
        x = step_callback(x, t) if step_callback else x
    return check_solution(x, len(steps))


def check_grid(times: Tensor) -> Tensor:
    """Return a checked grid, float64, on the CPU."""
    intervals(times)
    return times.detach().double().cpu()


def exponential(
    field: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    sigma: DiffusionCoefficient,
    noise: NoiseFunction,
    *,
    step_callback: StepCallback | None = None,
) -> Solution:
    """The SDE by the exponential integrator, the default: exact in the linear part, stable for every coefficient.

    One evaluation a step, order 1. With sigma = 0 it is DDIM, on CondOT
    Euler's method. `forward` may start at t = 0: all noise is then renewed.
    A sigma that stays up as beta falls costs accuracy there: a constant c on
    CondOT loses variance c^3 sqrt(h) / 3, since each of the last steps renews
    all noise around a frozen data prediction. Let sigma fall with beta.

    Args:
        field: velocity of (x, t), or (velocity, score).
        x: start, (B, *S), at times[0].
        times: grid, (n + 1,), rising, in [0, 1].
        path: the Gaussian path the field belongs to.
        sigma: diffusion coefficient of (t, coefficients), of t's shape, >= 0.
        noise: `noise(k)` -> (B, *S), standard normal, for step k from 0.
        step_callback: called with (x, t) after each step; what it returns goes on.

    Raises:
        ValueError: a grid that does not rise inside [0, 1]; a coefficient that
            is negative or not finite where it is needed; a start or an end that is not finite.
    """
    times = check_grid(times)
    return integrate_steps(exponential_coefficients(path, times, sigma), field, x, times, path, noise, step_callback)


def euler_maruyama(
    field: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    sigma: DiffusionCoefficient,
    noise: NoiseFunction,
    *,
    step_callback: StepCallback | None = None,
) -> Solution:
    """The SDE by Euler-Maruyama: weak order 1, one evaluation a step; unstable where sigma stays up as beta falls.

    Arguments and errors as in `exponential`.
    """
    times = check_grid(times)
    return integrate_steps(euler_maruyama_coefficients(path, times, sigma), field, x, times, path, noise, step_callback)


def stochastic_heun(
    field: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    sigma: DiffusionCoefficient,
    noise: NoiseFunction,
    *,
    step_callback: StepCallback | None = None,
) -> Solution:
    """The SDE by Heun's method: weak order 2, two evaluations a step, one in the last (Euler's, without noise).

    The noise is additive, so one draw serves both slopes; sigma over a step is
    the root mean square of its ends. Arguments and errors as in `exponential`.
    """
    times = check_grid(times)
    g = evaluate_diffusion(sigma, path, times[:-1])
    half = g**2 / 2
    x_factor, velocity_factor = (
        torch.where(half == 0, 0.0, half * part) for part in conversion_coefficients("velocity", "score", path(times[:-1]))
    )
    merged = torch.stack([x_factor, 1 + velocity_factor], 1).tolist()
    steps, x = intervals(times), check_start(x)
    score_factors, noise_scale = half.tolist(), torch.sqrt((half[:-1] + half[1:]) * times[:-1].diff()).tolist()

    def drift(k: int, point: Tensor) -> Tensor:
        velocity, score = velocity_and_score(field(point, expand_time(steps[k][0], point)))
        if score is not None:
            return torch.add(velocity, score, alpha=score_factors[k])
        return torch.add(point * merged[k][0], velocity, alpha=merged[k][1])

    for k, (s, t) in enumerate(steps[:-1]):
        h, noise_step = t - s, noise_scale[k] * noise(k)
        slope = drift(k, x)
        x = torch.add(x + noise_step, slope + drift(k + 1, torch.add(x + noise_step, slope, alpha=h)), alpha=h / 2)
        x = step_callback(x, t) if step_callback else x
    s, t = steps[-1]
    x = torch.add(x, velocity_and_score(field(x, expand_time(s, x)))[0], alpha=t - s)
    return check_solution(step_callback(x, t) if step_callback else x, 2 * len(steps) - 1)
