"""From a start to an end along a field: the solver that a sampler names, fed with noise by (seed, index)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..flow import (
    ODE_SOLVERS,
    SDE_SOLVERS,
    Path,
    Purpose,
    Solution,
    annealed_langevin,
    churned,
    coefficient,
    dpmpp_2m,
    initial,
    landed,
    langevin,
    normal,
    predictor_corrector,
    score_field,
    simulate_sde,
    singular,
)
from ..flow.field import Field
from ..flow.langevin import settling
from ..flow.solver import After
from .flow_model import Source
from .sampler import Sampler


def start(source: Source, seed: int, index: Tensor, t: float) -> Tensor:
    """Return where a solver starts at time t: (B, *S), a function of (seed, index)."""
    if source.prior is not None:
        return source.prior.draw(seed, 0, index, source.shape)
    return initial(source.path, normal(seed, Purpose.INITIAL, 0, index, source.shape), t)


def follow(
    source: Source,
    field: Field,
    x: Tensor,
    times: Tensor,
    sampler: Sampler,
    seed: int,
    index: Tensor,
    *,
    last_euler: bool = False,
    after: After | None = None,
) -> Solution:
    """Solve the ODE or the SDE; arguments as in flow.solver and flow.sde.

    Args:
        last_euler: treat the field as singular at the last time, whatever the source predicts.

    Raises:
        ValueError: an SDE solver, or churn, for a source without a score; what the solver refuses.
    """

    def noise(step: int) -> Tensor:
        return normal(seed, Purpose.DIFFUSION, step, index, source.shape)

    if sampler.solver in ODE_SOLVERS and not sampler.churn:
        return _follow_ode(source, field, x, times, sampler, last_euler, after)
    if source.prior is not None:
        what = "churn" if sampler.churn else f"solver={sampler.solver}"
        raise ValueError(f"{what} needs a score, which a path from a uniform prior has not: use dpmpp_2m, or another of the ODE.")
    if sampler.churn:
        low, high, second = sampler.churn_min, sampler.churn_max, sampler.solver == "heun"
        how: dict[str, Any] = {"churn": sampler.churn, "low": low, "high": high, "inflation": sampler.churn_noise}
        return churned(field, x, times, source.path, noise, **how, second_order=second, after=after)
    if sampler.solver in ("langevin", "annealed_langevin"):
        return _relax(source.path, field, x, times, sampler, noise)
    sigma = coefficient(sampler.sigma_t, sampler.sigma_scale)
    if sampler.solver == "predictor_corrector":
        snr, corrections = sampler.snr, sampler.corrections or 1
        return predictor_corrector(field, x, times, source.path, sigma, noise, snr=snr, corrections=corrections, after=after)
    if sampler.drift == "plain":
        return simulate_sde(field, x, times, lambda t: sigma(t, source.path(t)), noise, after=after)
    return SDE_SOLVERS[sampler.solver](field, x, times, source.path, sigma, noise, after=after)


def _follow_ode(
    source: Source, field: Field, x: Tensor, times: Tensor, sampler: Sampler, last_euler: bool, after: After | None
) -> Solution:
    """Solve the ODE, by the data prediction in the end where the field is singular there."""
    solver = ODE_SOLVERS[sampler.solver]
    ends = last_euler or singular(source.path, source.predict, float(times[-1]))
    if sampler.solver == "dpmpp_2m":  # ends on a data prediction by itself
        return solver(field, x, times, path=source.path, last_euler=last_euler, after=after)
    if sampler.solver == "euler":
        return solver(field, x, times, last_euler=ends, after=after)
    more = {"rtol": sampler.tolerance, "atol": sampler.tolerance} if sampler.solver == "dormand_prince" else {}
    if ends and float(source.path(times[-1]).b) == 0:
        return landed(solver, field, x, times, source.path, after=after, **more)
    return solver(field, x, times, last_euler=ends, after=after, **more)


def _relax(path: Path, field: Field, x: Tensor, times: Tensor, sampler: Sampler, noise: Callable[[int], Tensor]) -> Solution:
    """Langevin dynamics at the last time of a grid, or at every one in turn; steps in units of the last level's variance.

    At one level alone they would never arrive from noise: `langevin` comes there
    by the ODE, one evaluation an interval, and then takes as many steps as `sampler.steps`.
    """
    score = score_field(field, path)
    step = sampler.langevin_step * float(path(times[-1]).b) ** 2
    if sampler.solver == "annealed_langevin":
        repeats = sampler.corrections or settling(path, times, sampler.langevin_step)
        return annealed_langevin(score, x, times, path, step, repeats, noise)
    x, evaluations = dpmpp_2m(field, x, times, path=path)
    last = torch.full((len(x),), float(times[-1]), device=x.device, dtype=x.dtype)
    end = langevin(lambda point: score(point, last), x, step, sampler.steps, noise)
    return Solution(end.x, evaluations + end.evaluations)
