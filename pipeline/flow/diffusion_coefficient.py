"""Diffusion coefficients: how much noise an SDE adds at each time, by name, by a table, or by a function of the caller's.

Source: docs/mathematics.md section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .path import Coefficients, Path

DiffusionCoefficient = Callable[[Tensor, Coefficients], Tensor]  # of (t, coefficients there), of t's shape, >= 0

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
