"""DPM-Solver++(2M) on any Gaussian path, for any noise added on the way: two-step exponential integrators, one evaluation a step.

With the data prediction z known, the SDE is linear, and a step from s to t is

    x' = (beta_t / beta_s) keep x + integral of z_r dm_r + noise,    m_r = beta_t keep(r, t) alpha_r / beta_r.

`exponential` freezes z, so that the integral is `z (m_t - m_s)`. Here z runs on
the straight line through the last two predictions: `w (z_s - z_before)` comes
on top, and w is an integral of known functions, found by quadrature. The line
is drawn in the signal's share `alpha / sqrt(alpha^2 + beta^2)`: along the ODE
of Gaussian data of unit variance z is exactly linear in it, and it is finite at
both ends, so a path that ends clean ends on the extrapolated prediction. In the
log signal-to-noise ratio, as published, it ends on the last one.
Where a step renews the noise, z jumps with it, and a line through two such
predictions carries the jump on, at the next step the jump of the jump. So the
SDE takes a share of w only (`sde_extrapolation_factor`): 1 where all noise is kept, 1/2
where none is. The order stays 2.
Source: Lu et al., DPM-Solver++, algorithm 2 and appendix on the SDE; Xue et al.,
SA-Solver, eq. 14 (any sigma_t); docs/mathematics.md section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .diffusion_coefficient import DiffusionCoefficient, diffusion_coefficient
from .field import Field
from .path import CondOT, Path
from .sde import (
    GAUSS_NODES,
    GAUSS_WEIGHTS,
    NoiseFunction,
    check_grid,
    exponential_coefficients,
    integrate_steps,
    noise_kept_between,
    noise_kept_per_step,
)
from .solver import Solution, StepCallback


class ExtrapolationVariable(NamedTuple):
    """The variable in which predictions are joined by a line: a function of half the log signal-to-noise ratio, and its derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


SIGNAL_FRACTION = ExtrapolationVariable(
    lambda h: torch.sqrt(torch.sigmoid(2 * h)), lambda h: torch.sqrt(torch.sigmoid(2 * h)) * torch.sigmoid(-2 * h)
)
HALF_LOG_SNR = ExtrapolationVariable(lambda h: h, torch.ones_like)


def extrapolation_weights(
    path: Path, times: Tensor, sigma: DiffusionCoefficient, variable: ExtrapolationVariable = SIGNAL_FRACTION
) -> Tensor:
    """Return what each step adds of `z_s - z_before`, the change of the data prediction since the step before.

    By parts, `w = ((tau_t - tau_s) alpha_t - integral of m dtau) / (tau_s - tau_before)`.
    The integral is taken by Gauss's rule in the log signal-to-noise ratio; it
    is 0 where beta_t = 0. The last step is noise-free, as everywhere.

    Args:
        path: the field's path.
        times: grid, (n + 1,), float64, on the CPU.
        sigma: diffusion coefficient; zero for the ODE.
        variable: tau. HALF_LOG_SNR gives the published coefficients (those that
            diffusers calls `solver_type="heun"`), 0 where tau is infinite.

    Returns:
        (n,), float64; 0 in the first step.
    """
    half = path.log_snr(times) / 2
    tau, c = variable.value(half), path(times[2:])
    start, end = half[1:-1], torch.where(c.b > 0, half[2:], half[1:-1])
    middle, width = (end + start)[:, None] / 2, (end - start)[:, None] / 2
    h = middle + width * torch.cat([-GAUSS_NODES, GAUSS_NODES])
    stop = times[2:, None]
    inside = torch.minimum(torch.maximum(path.time_from_log_snr(2 * h), times[1:-1, None]), stop)
    keep = torch.ones_like(inside)
    if len(times) > 3:
        keep[:-1] = noise_kept_between(sigma, path, inside[:-1], stop[:-1].expand_as(inside[:-1]))
    m = c.b[:, None] * keep * torch.exp(h)
    integral = (m * variable.slope(h) * torch.cat([GAUSS_WEIGHTS, GAUSS_WEIGHTS])).sum(1) * width[:, 0]
    weight = (tau.diff()[1:] * c.a - integral) / tau.diff()[:-1]
    return torch.cat([weight.new_zeros(1), torch.where(weight.isfinite(), weight, 0.0)])


def sde_extrapolation_factor(keep: Tensor) -> Tensor:
    """Return the part of `extrapolation_weights` that the SDE takes, (n,): `(1 - k) / 2 / (1 + (1 - k) / log k)`, 1 at k = 1, 1/2 at k = 0.

    With all of it a constant coefficient of 2 on CondOT ends on 1.5 times the variance, and more steps do not help.

    Args:
        keep: k, how much of the old noise each step keeps, (n,), 0 to 1, as of `noise_kept_per_step`.
    """
    lost, rate = 1 - keep, -torch.log(keep)
    near = lost < 1e-5  # both are 1 - lost / 6 there, but for rounding
    return torch.where(near, 1.0, lost / 2 / torch.where(near, 1.0, 1 - lost / rate))


def dpmpp_2m(
    field: Field, x: Tensor, times: Tensor, *, path: Path | None = None, last_euler: bool = False, step_callback: StepCallback | None = None
) -> Solution:
    """Solve the ODE, sigma = 0 in this file's head: order 2, one evaluation a step, none at times[-1]; the default solver.

    Args:
        field, x, times, step_callback: as in `runge_kutta`.
        path: the field's path; by default the straight one, on which it solves any ODE.
        last_euler: end on the last data prediction, not on the one extrapolated.

    Raises:
        ValueError: as `runge_kutta`.
    """
    path, times, none = path or CondOT(), check_grid(times), diffusion_coefficient("zero")
    weights = extrapolation_weights(path, times, none)
    if last_euler:
        weights[-1] = 0
    return integrate_steps(exponential_coefficients(path, times, none), field, x, times, path, _no_noise, step_callback, weights)


def dpmpp_2m_sde(
    field: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    sigma: DiffusionCoefficient,
    noise: NoiseFunction,
    *,
    step_callback: StepCallback | None = None,
) -> Solution:
    """Solve the SDE by the two-step exponential integrator: weak order 2, one evaluation a step, stable for every coefficient.

    With `forward` it is SDE-DPM-Solver++(2M) on the variable SIGNAL_FRACTION, its look ahead times `sde_extrapolation_factor`.
    A learned score enters where `exponential` takes it; what is extrapolated is the velocity's data prediction.
    Arguments and errors as in `exponential`.
    """
    times = check_grid(times)
    keep = torch.ones(len(times) - 1, dtype=torch.float64)
    keep[:-1] = noise_kept_per_step(sigma, path, times[:-1])
    weights = extrapolation_weights(path, times, sigma) * sde_extrapolation_factor(keep)
    return integrate_steps(exponential_coefficients(path, times, sigma), field, x, times, path, noise, step_callback, weights)


def _no_noise(step: int) -> Tensor:
    raise AssertionError(f"noise was asked for in step {step} of an ODE")
