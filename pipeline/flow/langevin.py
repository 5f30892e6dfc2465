"""Langevin dynamics: sampling with a score alone, at one noise level or down a ladder of them.

    x <- x + (h / 2) score(x) + sqrt(h) xi

keeps the density whose score it is, up to O(h), but crosses between far modes
hardly ever; annealed over falling noise levels it finds them in proportion.
Source: docs/mathematics.md section 4; Song and Ermon, Generative Modeling by
Estimating Gradients of the Data Distribution, algorithm 1; Song et al.,
Score-Based Generative Modeling through SDEs, appendix G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .diffusion_coefficient import DiffusionCoefficient
from .field import Field, velocity_and_score
from .parameterisation import conversion_coefficients
from .path import Path
from .sde import NoiseFunction, exponential_coefficients
from .solver import Solution, StepCallback, check_solution, check_start, expand_time
from .time_grid import intervals


def langevin(score: Callable[[Tensor], Tensor], x: Tensor, step: float, steps: int, noise: NoiseFunction) -> Solution:
    """Langevin dynamics of one density.

    Args:
        score: of x, (B, *S) -> (B, *S).
        x: start, (B, *S).
        step: h, squared data units; > 0, small beside the narrowest variance.
        steps: how many, >= 1.
        noise: `noise(k)` -> (B, *S), standard normal, for step k from 0.

    Raises:
        ValueError: a step or number of steps that is not positive; a start or an end that is not finite.
    """
    _check(step, steps)
    x = check_start(x)
    for k in range(steps):
        x = torch.add(torch.add(x, score(x), alpha=step / 2), noise(k), alpha=math.sqrt(step))
    return check_solution(x, steps)


def annealed_langevin(
    score: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    step: float,
    repeats: int | Sequence[int],
    noise: NoiseFunction,
    *,
    step_callback: StepCallback | None = None,
) -> Solution:
    """NCSN's sampler: Langevin dynamics at each noise level, from the largest to the smallest.

    At the level of noise beta_i the step is `h beta_i^2 / beta_L^2`, with beta_L
    the last, so that signal and noise of a step keep their ratio. Between two
    levels x is multiplied by `alpha_next / alpha` (the change of variables `x / alpha`), since
    the mean of p_t moves with alpha; on VE, for which this is written in the
    literature, that is 1. From alpha = 0, where x is noise alone, it is
    multiplied by `beta_next / beta`.

    Args:
        score: of (x, t), the score of p_t.
        x: start, (B, *S), e.g. `initial(path, noise)`.
        times: of the levels, (L,), rising, in [0, 1]; geometric levels are a uniform grid on VE.
        path: the score's path.
        step: h, the step at the last level, squared data units; below about sigma_L^2.
        repeats: steps at each level, >= 1; one number, or one for each level, as `langevin_steps_per_level` gives them.
        noise: `noise(k)`, k counting all steps from 0.
        step_callback: called with (x, t) after each level; what it returns goes on.

    Returns:
        The end, with noise of size sigma_L left in it, and as many evaluations as steps.

    Raises:
        ValueError: as `langevin`; times that do not rise in [0, 1].
    """
    steps_per_level = [repeats] * times.numel() if isinstance(repeats, int) else list(repeats)
    _check(step, min(steps_per_level, default=0))
    intervals(times)
    if len(steps_per_level) != times.numel():
        raise ValueError(f"{len(steps_per_level)} numbers of steps for {times.numel()} levels: give one for each, or one for all.")
    c, draw = path(times.double()), 0
    sizes, x = (step * (c.b / c.b[-1]) ** 2).tolist(), check_start(x)
    growth = [1.0, *torch.where(c.a[:-1] > 0, c.a[1:] / c.a[:-1], c.b[1:] / c.b[:-1]).tolist()]
    for i, t in enumerate(times.tolist()):
        now, x = expand_time(t, x), x if growth[i] == 1 else x * growth[i]
        for _ in range(steps_per_level[i]):
            x = torch.add(torch.add(x, score(x, now), alpha=sizes[i] / 2), noise(draw), alpha=math.sqrt(sizes[i]))
            draw += 1
        x = step_callback(x, t) if step_callback else x
    return check_solution(x, draw)


def langevin_steps_per_level(path: Path, times: Tensor, step_fraction: float, relaxation_times: float = 4.0) -> list[int]:
    """Return how many Langevin steps each level wants, so that the noise in x follows the levels down.

    A step of `step_fraction` times the level's variance takes off the step_fraction / 2 of what
    is too much; the change to a level leaves too much by the ratio of both
    noise-to-signal ratios.

    Args:
        path, times: as in `annealed_langevin`.
        step_fraction: of a level's variance, 0 to 2: its step.
        relaxation_times: how many times as many steps as would take off just that ratio.

    Returns:
        One number for each level, at least 1.
    """
    if not 0 < step_fraction < 2:
        raise ValueError(f"langevin_step={step_fraction}: a step is between 0 and 2 times the level's variance. Use 0.2.")
    log_ratios = (path.log_snr(times.double()).diff() / 2).tolist()
    rate = -math.log1p(-step_fraction / 2)
    return [1, *(max(1, math.ceil(relaxation_times * d / rate)) if math.isfinite(d) else 1 for d in log_ratios)]


def predictor_corrector(
    field: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    sigma: DiffusionCoefficient,
    noise: NoiseFunction,
    *,
    snr: float = 0.16,
    corrections: int = 1,
    step_callback: StepCallback | None = None,
) -> Solution:
    """A step of the SDE, then Langevin steps at the time reached; none after the last, noise-free step.

    The corrector's step is `h = 4 (snr |xi| / |score|)^2` in Song et al.,
    with norms averaged over the batch. Here |xi| / |score| is beta, its value
    where x is a datum and noise: then no sample depends on its neighbours, the
    step does not depend on x (which would bend the density), and nothing waits
    for an accelerator. So `h = 4 snr^2 beta^2` in the form of this file's head.

    Args:
        field, x, times, path, sigma: as in `exponential`, which is the predictor.
        noise: `noise(k)`, k counting draws from 0: predictor, then correctors, step by step.
        snr: signal-to-noise ratio of a correction; > 0.
        corrections: Langevin steps after each predictor step, >= 1.
        step_callback: called with (x, t) after each step.

    Raises:
        ValueError: as `exponential`; an snr or number that is not positive.
    """
    _check(snr, corrections)
    steps, x, draw = intervals(times), check_start(x), 0
    times = times.detach().double().cpu()
    step_coefficients = torch.stack(list(exponential_coefficients(path, times, sigma)), 1).tolist()
    c = path(times[:-1])
    beta, x_factor, velocity_factor = c.b.tolist(), *(part.tolist() for part in conversion_coefficients("velocity", "score", c))

    def velocity_and_score_at(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Velocity and score at a time of the grid."""
        velocity, score = velocity_and_score(field(x, expand_time(steps[k][0], x)))
        return velocity, torch.add(x * x_factor[k], velocity, alpha=velocity_factor[k]) if score is None else score

    for k, (_, t) in enumerate(steps):
        p, q, score_factor, noise_factor = step_coefficients[k]
        velocity, score = velocity_and_score_at(x, k)
        x = torch.add(x * p, velocity, alpha=q)
        if score_factor:
            x = torch.add(x, score, alpha=score_factor)
        if noise_factor:
            x, draw = torch.add(x, noise(draw), alpha=noise_factor), draw + 1
        for _ in range(corrections if k + 1 < len(steps) else 0):
            h = 4 * (snr * beta[k + 1]) ** 2
            x = torch.add(torch.add(x, velocity_and_score_at(x, k + 1)[1], alpha=h / 2), noise(draw), alpha=math.sqrt(h))
            draw += 1
        x = step_callback(x, t) if step_callback else x
    return check_solution(x, len(steps) + (len(steps) - 1) * corrections)


def _check(step: float, steps: int) -> None:
    if not 0 < step < math.inf or steps < 1:
        raise ValueError(
            f"step={step}, steps={steps} of Langevin dynamics: a positive step, at least one of them. Use a tenth of the variance."
        )
