"""Langevin dynamics: sampling with a score alone, at one noise level or down a ladder of them.

    x <- x + (h / 2) score(x) + sqrt(h) xi

keeps the density whose score it is, up to O(h), but crosses between far modes
hardly ever; annealed over falling noise levels it finds them in proportion.
Source: mathematics.md section 4; Song and Ermon, Generative Modeling by
Estimating Gradients of the Data Distribution, algorithm 1; Song et al.,
Score-Based Generative Modeling through SDEs, appendix G.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .field import Field, velocity_and_score
from .grid import intervals
from .parameterisation import change
from .path import Path
from .sde import Coefficient, Noise, exponential_plan
from .solver import After, Solution, at, begin, finish


def langevin(score: Callable[[Tensor], Tensor], x: Tensor, step: float, steps: int, noise: Noise) -> Solution:
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
    x = begin(x)
    for k in range(steps):
        x = torch.add(torch.add(x, score(x), alpha=step / 2), noise(k), alpha=math.sqrt(step))
    return finish(x, steps)


def annealed_langevin(
    score: Field, x: Tensor, times: Tensor, path: Path, step: float, repeats: int, noise: Noise, *, after: After | None = None
) -> Solution:
    """NCSN's sampler: Langevin dynamics at each noise level, from the largest to the smallest.

    At the level sigma_i = beta / alpha the step is `h sigma_i^2 / sigma_L^2`, with
    sigma_L the last, so that signal and noise of a step keep their ratio.

    Args:
        score: of (x, t), the score of p_t.
        x: start, (B, *S), e.g. `initial(path, noise)`.
        times: of the levels, (L,), rising, in [0, 1]; geometric levels are a uniform grid on VE.
        path: the score's path.
        step: h, the step at the last level, squared data units; below about sigma_L^2.
        repeats: steps at each level, >= 1.
        noise: `noise(k)`, k counting all steps from 0.
        after: called with (x, t) after each level; what it returns goes on.

    Returns:
        The end, with noise of size sigma_L left in it, and L x repeats evaluations.

    Raises:
        ValueError: as `langevin`; times that do not rise in [0, 1].
    """
    _check(step, repeats)
    intervals(times)
    c = path(times.double())
    sizes, x = (step * (c.b / c.b[-1]) ** 2).tolist(), begin(x)
    for i, t in enumerate(times.tolist()):
        now = at(t, x)
        for k in range(repeats):
            x = torch.add(torch.add(x, score(x, now), alpha=sizes[i] / 2), noise(i * repeats + k), alpha=math.sqrt(sizes[i]))
        x = after(x, t) if after else x
    return finish(x, len(sizes) * repeats)


def predictor_corrector(
    field: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    sigma: Coefficient,
    noise: Noise,
    *,
    snr: float = 0.16,
    corrections: int = 1,
    after: After | None = None,
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
        after: called with (x, t) after each step.

    Raises:
        ValueError: as `exponential`; an snr or number that is not positive.
    """
    _check(snr, corrections)
    steps, x, draw = intervals(times), begin(x), 0
    times = times.detach().double().cpu()
    plan = torch.stack(list(exponential_plan(path, times, sigma)), 1).tolist()
    c = path(times[:-1])
    beta, of_x, of_velocity = c.b.tolist(), *(part.tolist() for part in change("velocity", "score", c))

    def both(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Velocity and score at a time of the grid."""
        velocity, score = velocity_and_score(field(x, at(steps[k][0], x)))
        return velocity, torch.add(x * of_x[k], velocity, alpha=of_velocity[k]) if score is None else score

    for k, (_, t) in enumerate(steps):
        p, q, of_score, of_noise = plan[k]
        velocity, score = both(x, k)
        x = torch.add(x * p, velocity, alpha=q)
        if of_score:
            x = torch.add(x, score, alpha=of_score)
        if of_noise:
            x, draw = torch.add(x, noise(draw), alpha=of_noise), draw + 1
        for _ in range(corrections if k + 1 < len(steps) else 0):
            h = 4 * (snr * beta[k + 1]) ** 2
            x = torch.add(torch.add(x, both(x, k + 1)[1], alpha=h / 2), noise(draw), alpha=math.sqrt(h))
            draw += 1
        x = after(x, t) if after else x
    return finish(x, len(steps) + (len(steps) - 1) * corrections)


def _check(step: float, steps: int) -> None:
    if not 0 < step < math.inf or steps < 1:
        raise ValueError(
            f"step={step}, steps={steps} of Langevin dynamics: a positive step, at least one of them. Use a tenth of the variance."
        )
