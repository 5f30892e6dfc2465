"""Log-probabilities of SDE steps: what reinforcement learning of a sampler (DDPO, Flow-GRPO) asks of it.

A planned step of `sde.py` is `x' = P x + Q u + S score + R xi`, so given x it is
normal with mean `P x + Q u + S score` and standard deviation R in every
direction. Its logarithm is the policy's; only the mean depends on the network.
Sources: docs/mathematics.md section 4; Black et al., Training Diffusion Models with
Reinforcement Learning, section 4.2; Liu et al., Flow-GRPO, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .diffusion_coefficient import DiffusionCoefficient
from .field import Field, velocity_and_score
from .parameterisation import conversion_coefficients
from .path import Path
from .sde import StepCoefficients, euler_maruyama_coefficients, exponential_coefficients
from .solver import expand_time

REDUCTIONS = ("sum", "mean")
COEFFICIENTS_BY_SOLVER: dict[str, Callable[[Path, Tensor, DiffusionCoefficient], StepCoefficients]] = {
    "exponential": exponential_coefficients,
    "euler_maruyama": euler_maruyama_coefficients,
}
"""Of the solvers whose steps are normal, each given the one before."""


def step_log_prob(x_next: Tensor, mean: Tensor, std: float | Tensor, *, reduction: str = "sum") -> Tensor:
    """Return log N(x_next; mean, std^2 I), one per sample.

    Gradients reach every argument. A policy's gradient takes x_next as given: detach it, or what reaches it through the mean cancels.

    Args:
        x_next: where the step led, (B, *S), data units.
        mean: of the step, (B, *S).
        std: > 0; a number, or (B, 1, ..., 1).
        reduction: `sum` over the D values of a sample, the logarithm of a density in (data units)^-D; `mean`, that over D, as DDPO
            and Flow-GRPO take it.

    Returns:
        (B,), summed in float64, where float32 would lose the digits that a ratio of policies needs.

    Raises:
        ValueError: another shape; a deviation that is not positive and finite: a noise-free step has no density; an unknown reduction.
    """
    if x_next.shape != mean.shape or mean.ndim < 2:
        raise ValueError(f"x_next {tuple(x_next.shape)} and mean {tuple(mean.shape)}: both are of one shape, (B, *S).")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown: choose one of {', '.join(REDUCTIONS)}.")
    size, exact = mean[0].numel(), torch.float32 if mean.device.type == "mps" else torch.float64
    width = torch.as_tensor(std, dtype=exact, device="cpu" if isinstance(std, float | int) else mean.device)
    if width.device.type == "cpu" and not bool(((width > 0) & (width < math.inf)).all()):
        raise ValueError(
            f"std={width.min().item()}: the deviation of a step is positive and finite. Leave noise-free steps out, as the last."
        )
    if width.ndim and width.shape != (len(mean), *[1] * (mean.ndim - 1)):
        raise ValueError(f"std {tuple(width.shape)} beside mean {tuple(mean.shape)}: one number, or (B, 1, ..., 1).")
    squares = ((x_next - mean) / width.to(mean)).square().flatten(1).sum(1, dtype=exact)
    total = -squares / 2 - size * (torch.log(width).flatten().to(mean.device) + math.log(2 * math.pi) / 2)
    return total / size if reduction == "mean" else total


def step_distribution(step_coefficients: StepCoefficients, k: int, x: Tensor, velocity: Tensor, score: Tensor) -> tuple[Tensor, float]:
    """Return mean, (B, *S), and standard deviation of planned step k, given the point x and what the network gives there.

    Args:
        step_coefficients: by one of COEFFICIENTS_BY_SOLVER.
        k: the step's number, from 0; the deviation of the last is 0.
        x: where the step begins, (B, *S), data units.
        velocity: (B, *S), data units per unit time.
        score: (B, *S); where it is not learned, `convert(velocity, "velocity", "score", ...)`.
    """
    p, q, s, r = (part[k].item() for part in step_coefficients)
    mean = torch.add(p * x, velocity, alpha=q)
    return (torch.add(mean, score, alpha=s) if s else mean), r


def trajectory_log_prob(
    field: Field,
    points: Sequence[Tensor],
    times: Tensor,
    path: Path,
    sigma: DiffusionCoefficient,
    *,
    solver: str = "exponential",
    reduction: str = "sum",
) -> Tensor:
    """Return the logarithm of every step of recorded trajectories, under a field that may have changed since.

    Args:
        field: velocity of (x, t), or (velocity, score); evaluated once a step, with gradients.
        points: n + 1 of them, each (B, *S): the start and what each step led to; taken as given.
        times: grid, (n + 1,), rising, in [0, 1].
        path, sigma, solver: as the trajectories were drawn, by `exponential` or `euler_maruyama`.
        reduction: as in `step_log_prob`.

    Returns:
        (n, B), float64; zero in steps without noise, the last among them, which are certain under every field. Their sum over steps
        is the logarithm of the trajectory's density given its start.

    Raises:
        ValueError: a solver whose steps are not normal, or depend on more than the one before; points that are not one more than
            steps; a plan without any noise.
    """
    times = times.detach().double().cpu()
    if solver not in COEFFICIENTS_BY_SOLVER:
        raise ValueError(
            f"solver={solver!r} has no log-probability: choose one of {', '.join(COEFFICIENTS_BY_SOLVER)}, whose steps are normal."
        )
    step_coefficients = COEFFICIENTS_BY_SOLVER[solver](path, times, sigma)
    if len(points) != len(times):
        raise ValueError(f"{len(points)} points on a grid of {len(times)} times: record the start and the end of every step.")
    if not bool((step_coefficients.noise > 0).any()):
        raise ValueError("no step of this plan draws anything, so there is no density. Take a diffusion coefficient above zero.")
    x_factor, velocity_factor = conversion_coefficients("velocity", "score", path(times[:-1]))
    log_probs = []
    for k, (x, x_next) in enumerate(pairwise(points)):
        if not step_coefficients.noise[k]:
            log_probs.append(torch.zeros(len(x), dtype=torch.float64, device=x.device))
            continue
        x, x_next = x.detach(), x_next.detach()
        velocity, score = velocity_and_score(field(x, expand_time(times[k].item(), x)))
        if score is None and step_coefficients.score[k]:
            score = x_factor[k].item() * x + velocity_factor[k].item() * velocity
        mean, std = step_distribution(step_coefficients, k, x, velocity, velocity if score is None else score)
        log_probs.append(step_log_prob(x_next, mean, std, reduction=reduction))
    return torch.stack(log_probs)
