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

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .diffusion_coefficient import DiffusionCoefficient, NamedDiffusion, evaluate_diffusion
from .field import Field, velocity_and_score
from .parameterisation import conversion_coefficients
from .path import Path
from .solver import Solution, StepCallback, check_solution, check_start, expand_time
from .time_grid import intervals

NoiseFunction = Callable[[int], Tensor]  # of the step's number, standard normal, (B, *S)
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
