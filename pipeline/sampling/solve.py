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
    diffusion_coefficient,
    dpmpp_2m,
    edm_sampler,
    is_singular,
    langevin,
    normal,
    predictor_corrector,
    scale_initial_noise,
    score_field,
    simulate_sde,
    solve_then_denoise,
)
from ..flow.field import Field
from ..flow.langevin import langevin_steps_per_level
from ..flow.solver import StepCallback
from .flow_model import FlowModel
from .sampler import Sampler


def initial_point(model: FlowModel, seed: int, index: Tensor, t: float) -> Tensor:
    """Return where a solver starts at time t: (B, *S), a function of (seed, index)."""
    if model.prior is not None:
        return model.prior.sample(seed, 0, index, model.shape)
    return scale_initial_noise(model.path, normal(seed, Purpose.INITIAL, 0, index, model.shape), t)


def integrate(
    model: FlowModel,
    field: Field,
    x: Tensor,
    times: Tensor,
    sampler: Sampler,
    seed: int,
    index: Tensor,
    *,
    last_euler: bool = False,
    step_callback: StepCallback | None = None,
) -> Solution:
    """Solve the ODE or the SDE; arguments as in flow.solver and flow.sde.

    Args:
        last_euler: treat the field as singular at the last time, whatever the model predicts.

    Raises:
        ValueError: an SDE solver, or churn, for a model without a score; what the solver refuses.
    """

    def noise(step: int) -> Tensor:
        return normal(seed, Purpose.DIFFUSION, step, index, model.shape)

    if sampler.solver in ODE_SOLVERS and not sampler.churn:
        return _solve_ode(model, field, x, times, sampler, last_euler, step_callback)
    if model.prior is not None:
        what = "churn" if sampler.churn else f"solver={sampler.solver}"
        raise ValueError(f"{what} needs a score, which a path from a uniform prior has not: use dpmpp_2m, or another of the ODE.")
    if sampler.churn:
        low, high, second = sampler.churn_min, sampler.churn_max, sampler.solver == "heun"
        how: dict[str, Any] = {"s_churn": sampler.churn, "s_tmin": low, "s_tmax": high, "s_noise": sampler.churn_noise}
        return edm_sampler(field, x, times, model.path, noise, **how, second_order=second, step_callback=step_callback)
    if sampler.solver in ("langevin", "annealed_langevin"):
        return _run_langevin(model.path, field, x, times, sampler, noise)
    sigma = diffusion_coefficient(sampler.sigma_t, sampler.sigma_scale)
    if sampler.solver == "predictor_corrector":
        snr, corrections = sampler.snr, sampler.corrections or 1
        return predictor_corrector(field, x, times, model.path, sigma, noise, snr=snr, corrections=corrections, step_callback=step_callback)
    if sampler.drift == "plain":
        return simulate_sde(field, x, times, lambda t: sigma(t, model.path(t)), noise, step_callback=step_callback)
    return SDE_SOLVERS[sampler.solver](field, x, times, model.path, sigma, noise, step_callback=step_callback)


def _solve_ode(
    model: FlowModel, field: Field, x: Tensor, times: Tensor, sampler: Sampler, last_euler: bool, step_callback: StepCallback | None
) -> Solution:
    """Solve the ODE, by the data prediction in the end where the field is singular there."""
    solver = ODE_SOLVERS[sampler.solver]
    ends = last_euler or is_singular(model.path, model.predict, float(times[-1]))
    if sampler.solver == "dpmpp_2m":  # ends on a data prediction by itself
        return solver(field, x, times, path=model.path, last_euler=last_euler, step_callback=step_callback)
    if sampler.solver == "euler":
        return solver(field, x, times, last_euler=ends, step_callback=step_callback)
    tolerances = {"rtol": sampler.tolerance, "atol": sampler.tolerance} if sampler.solver == "dormand_prince" else {}
    if ends and float(model.path(times[-1]).b) == 0:
        return solve_then_denoise(solver, field, x, times, model.path, step_callback=step_callback, **tolerances)
    return solver(field, x, times, last_euler=ends, step_callback=step_callback, **tolerances)


def _run_langevin(path: Path, field: Field, x: Tensor, times: Tensor, sampler: Sampler, noise: Callable[[int], Tensor]) -> Solution:
    """Langevin dynamics at the last time of a grid, or at every one in turn; steps in units of the last level's variance.

    At one level alone they would never arrive from noise: `langevin` comes there
    by the ODE, one evaluation an interval, and then takes as many steps as `sampler.steps`.
    """
    score = score_field(field, path)
    step = sampler.langevin_step * float(path(times[-1]).b) ** 2
    if sampler.solver == "annealed_langevin":
        repeats = sampler.corrections or langevin_steps_per_level(path, times, sampler.langevin_step)
        return annealed_langevin(score, x, times, path, step, repeats, noise)
    x, evaluations = dpmpp_2m(field, x, times, path=path)
    last = torch.full((len(x),), float(times[-1]), device=x.device, dtype=x.dtype)
    end = langevin(lambda point: score(point, last), x, step, sampler.steps, noise)
    return Solution(end.x, evaluations + end.evaluations)
