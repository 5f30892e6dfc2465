"""Solvers: from noise at t = 0 to data at t = 1 along a learned field.

The ODE `dX = u dt` and, for any coefficient `sigma_t >= 0` chosen after
training, the SDE `dX = [u + sigma_t^2 / 2 score] dt + sigma_t dW` have the
same marginals. A grid of n + 1 times means n steps. Every solver returns how
often it evaluated the field.
Source: mathematics.md section 4; Hairer, Norsett and Wanner, chapter II;
Ma et al., SiT, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .guidance import Field
from .parameterisation import convert
from .path import Coefficients, Path, widen

Coefficient = Callable[[Tensor, Coefficients], Tensor]


class Solution(NamedTuple):
    """The end point, (B, *S), and the number of evaluations of the field."""

    x: Tensor
    evaluations: int


def uniform_grid(steps: int) -> Tensor:
    """`steps` equal intervals from 0 to 1: steps + 1 times, float64.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"num_inference_steps={steps}: a solver takes at least one step. Use 25 to 50 as a rule.")
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def _intervals(times: Tensor) -> list[tuple[float, float]]:
    """The grid as pairs of floats; a ValueError unless it rises strictly inside [0, 1]."""
    grid = times.tolist()
    if len(grid) < 2 or grid[0] < 0 or grid[-1] > 1 or any(not s < t for s, t in zip(grid, grid[1:], strict=False)):
        raise ValueError(f"times {grid} are no grid: at least two, rising strictly, inside [0, 1] from noise to data.")
    return list(zip(grid, grid[1:], strict=False))


def _at(t: float, x: Tensor) -> Tensor:
    """One time for all samples, (B,)."""
    return torch.full((x.shape[0],), t, device=x.device, dtype=x.dtype)


def euler(field: Field, x: Tensor, times: Tensor) -> Solution:
    """Order 1, one evaluation a step.

    Args:
        field: velocity of (x, t).
        x: start, (B, *S), at times[0].
        times: grid, (n + 1,), rising.

    Raises:
        ValueError: a grid that does not rise inside [0, 1].
    """
    steps = _intervals(times)
    for s, t in steps:
        x = x + (t - s) * field(x, _at(s, x))
    return Solution(x, len(steps))


def heun(field: Field, x: Tensor, times: Tensor) -> Solution:
    """Order 2, two evaluations a step: the mean of the slopes at both ends.

    Arguments and errors as in `euler`. The field is evaluated at times[-1]
    too; a velocity that is converted from data is singular at t = 1.
    """
    steps = _intervals(times)
    for s, t in steps:
        slope = field(x, _at(s, x))
        ahead = field(x + (t - s) * slope, _at(t, x))
        x = x + (t - s) / 2 * (slope + ahead)
    return Solution(x, 2 * len(steps))


def euler_maruyama(field: Field, x: Tensor, times: Tensor, path: Path, sigma: Coefficient, noise: Callable[[int], Tensor]) -> Solution:
    """The SDE by Euler-Maruyama: weak order 1, one evaluation a step.

    The last step takes sigma = 0, that is, a step of the ODE: it ends on the
    posterior mean and not on noise, and leaves the marginals as they are.

    Args:
        field, x, times: as in `euler`.
        path: the Gaussian path the field belongs to, for its score.
        sigma: diffusion coefficient of (t, coefficients), of t's shape, >= 0.
        noise: `noise(k)` -> (B, *S), standard normal, for step k from 0.

    Raises:
        ValueError: a grid as in `euler`; a coefficient that is negative or
            not finite at a time where it is needed.
    """
    steps = _intervals(times)
    for k, (s, t) in enumerate(steps):
        now, h = _at(s, x), t - s
        v = field(x, now)
        if k + 1 == len(steps):
            x = x + h * v
            break
        c = path(widen(now, x))
        g = sigma(widen(now, x), c)
        level = g.flatten()[0].item()
        if not 0 <= level < math.inf:
            raise ValueError(f"sigma_t={level} at t={s}: a diffusion coefficient is finite and not negative. Start the grid later, or take another.")
        if level == 0:
            x = x + h * v
            continue
        score = convert(v, "velocity", "score", x, c)
        x = x + h * (v + g**2 / 2 * score) + math.sqrt(h) * g * noise(k)
    return Solution(x, len(steps))


def coefficient(name: str, scale: float = 1.0) -> Coefficient:
    """A named diffusion coefficient sigma_t.

    Args:
        name: `zero` (the ODE), `constant`, `noise` (in proportion to beta) or
            `forward` (`sqrt(2 (b^2 da / a - db b))`, the reverse-time SDE of
            the forward process; infinite at t = 0).
        scale: a factor, >= 0.

    Raises:
        ValueError: an unknown name, or a scale that is negative or not finite.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"sigma_scale={scale}: the scale of a diffusion coefficient is finite and not negative.")
    if name not in COEFFICIENTS:
        raise ValueError(f"sigma_t={name!r} is unknown: choose one of {', '.join(COEFFICIENTS)}.")
    shape = COEFFICIENTS[name]
    return lambda t, c: scale * shape(t, c)


COEFFICIENTS: dict[str, Coefficient] = {
    "zero": lambda t, c: torch.zeros_like(t),
    "constant": lambda t, c: torch.ones_like(t),
    "noise": lambda t, c: c.b,
    "forward": lambda t, c: torch.sqrt(2 * (c.b**2 * c.da / c.a - c.db * c.b)),
}
ODE_SOLVERS: dict[str, Callable[[Field, Tensor, Tensor], Solution]] = {"euler": euler, "heun": heun}
SDE_SOLVERS = {"euler_maruyama": euler_maruyama}
