"""Karras et al.'s stochastic sampler: noise is added before a step of the ODE, which then begins from the higher level.

Their algorithm 2 is told for `x = z + sigma eps`. Any Gaussian path is that
one after the change of variables `x / alpha`, `sigma = beta / alpha`, which is
how it is followed here.
Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, algorithm 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .field import Field, velocity_and_score
from .parameterisation import conversion_coefficients
from .path import Path
from .sde import NoiseFunction, check_grid
from .solver import Solution, StepCallback, check_solution, check_start, expand_time
from .time_grid import intervals


def check_churn(s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> None:
    """Raise ValueError unless churn and noise factor are finite and not negative, and 0 <= low <= high."""
    if not (0 <= s_churn < math.inf and 0 <= s_noise < math.inf and 0 <= s_tmin <= s_tmax):
        raise ValueError(
            f"churn={s_churn} between levels {s_tmin} and {s_tmax}, churn_noise={s_noise}: finite and not negative, the lower level first. "
            f"Use 0 for none, or 40, 0.05, 50, 1.003 as Karras et al. for ImageNet."
        )


def edm_sampler(
    field: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    noise: NoiseFunction,
    *,
    s_churn: float,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    second_order: bool = True,
    step_callback: StepCallback | None = None,
) -> Solution:
    """Solve the ODE by Heun's or Euler's method in sigma, with churn.

    Where alpha = 0, at t = 0 of some paths, sigma is infinite: that step is
    Euler's, without churn. No level rises above the path's own first one,
    since no network was trained there.

    Args:
        field: velocity of (x, t).
        x: start, (B, *S), at times[0].
        times: grid, (n + 1,), rising, in [0, 1].
        path: the Gaussian path the field belongs to.
        noise: `noise(k)` -> (B, *S), standard normal, for step k from 0.
        s_churn: S_churn; a step raises sigma by the factor `1 + min(churn / n, sqrt(2) - 1)`.
        s_tmin, s_tmax: the levels sigma between which it does.
        s_noise: S_noise, the standard deviation of what is added; 1 keeps the marginals.
        second_order: Heun's method, two evaluations a step, one where beta = 0 at its end; else Euler's.
        step_callback: called with (x, t) after each step; what it returns goes on.

    Raises:
        ValueError: as `runge_kutta` and `check_churn`.
    """
    check_churn(s_churn, s_tmin, s_tmax, s_noise)
    times = check_grid(times)
    steps, x, evaluations = intervals(times), check_start(x), 0
    gain = min(s_churn / len(steps), math.sqrt(2) - 1)
    first, c = path(times.new_zeros(())), path(times)
    widest, sigma = (first.b / first.a).item(), c.b / c.a
    inside = (sigma >= s_tmin) & (sigma <= s_tmax) & sigma.isfinite()
    raised = torch.where(inside, torch.clamp(sigma * (1 + gain), max=widest), sigma)[:-1]
    start_times = torch.where(raised > sigma[:-1], path.time_from_log_snr(-2 * torch.log(raised)), times[:-1]).clamp(0, 1)
    start = path(start_times)
    added = (c.a[:-1] * s_noise * torch.sqrt((raised**2 - sigma[:-1] ** 2).nan_to_num(nan=0.0))).tolist()
    scale = torch.where(raised > sigma[:-1], start.a / c.a[:-1], 1.0).tolist()
    parts = [torch.stack(conversion_coefficients("velocity", kind, start), 1).tolist() for kind in ("data", "noise")]
    noise_after = torch.stack(conversion_coefficients("velocity", "noise", c), 1).tolist()
    half = (c.a[1:] * (sigma[1:] - raised) / 2).tolist()
    a, b = c.a.tolist(), c.b.tolist()
    for k, (_, t) in enumerate(steps):
        if added[k]:
            x = torch.add(x, noise(k), alpha=added[k]) * scale[k]
        velocity = velocity_and_score(field(x, expand_time(start_times[k].item(), x)))[0]
        data, eps = (torch.add(x * x_factor, velocity, alpha=velocity_factor) for x_factor, velocity_factor in (parts[0][k], parts[1][k]))
        x, evaluations = torch.add(data * a[k + 1], eps, alpha=b[k + 1]), evaluations + 1
        if second_order and b[k + 1] > 0 and math.isfinite(half[k]):
            velocity, (x_factor, velocity_factor) = velocity_and_score(field(x, expand_time(t, x)))[0], noise_after[k + 1]
            x, evaluations = torch.add(x, torch.add(x * x_factor, velocity, alpha=velocity_factor) - eps, alpha=half[k]), evaluations + 1
        x = step_callback(x, t) if step_callback else x
    return check_solution(x, evaluations)
