"""Averages of the weights by a power of time, and how those of any width follow from a few that were kept.

With theta(tau) the weights when tau images were seen, the average of exponent
gamma at time t is

    (gamma + 1) / t^(gamma + 1)  integral_0^t  tau^gamma theta(tau) dtau.

Its relative width is the standard deviation of that profile of tau over t. What
was kept at several times, of one width or more, spans other profiles: the nearest
combination of them is found by least squares, from integrals in closed form.

Source: Karras et al. 2024, Analyzing and Improving the Training Dynamics of
Diffusion Models (EDM2), section 3.1 and appendix C. Ours to answer for: the
combination is made to sum to one, so that what does not change in training is
rebuilt exactly; it is held small by a ridge; and its error is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NARROWEST, WIDEST = 1e-6, 0.28
"""Relative widths lie between: an exponent of zero, the plain mean, has 0.2887."""
RIDGE = 1e-10
"""Added to unit squared norms: coefficients stay so small that float32's rounding of what was kept does not count."""
MIN_COEFFICIENT = 1e-7
"""Coefficients below this are left out: they add less than float32 rounds."""
MAX_RELATIVE_ERROR = 0.01
"""The largest relative error of a profile that is still called rebuilt."""


def exponent_to_width(exponent: float) -> float:
    """The relative width of an exponent gamma >= 0: the standard deviation of tau / t. EDM2, equation 123."""
    width: float = ((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3))) ** 0.5
    return width


def width_to_exponent(width: float) -> float:
    """The exponent gamma of a relative width.

    Args:
        width: from NARROWEST, below WIDEST.

    Raises:
        ValueError: another width.
    """
    if not NARROWEST <= width < WIDEST:
        raise ValueError(f"a relative width of {width:g}: it lies between {NARROWEST:g} and {WIDEST}. Use 0.1.")
    low, high = 0.0, 1 / width  # the width falls with the exponent, and lies below 1 / (exponent + 1)
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if exponent_to_width(middle) > width else (low, middle)
    return (low + high) / 2


def power_decay(exponent: float, images: float, batch: float) -> float:
    """What is kept of a power average in one update, exact for weights that stay as they are between updates.

    Args:
        exponent: gamma.
        images: seen so far, this batch included.
        batch: images of this step; the first update, of `images` = `batch`, takes the weights.

    Returns:
        A factor in [0, 1).
    """
    factor: float = max(0.0, 1 - batch / images) ** (exponent + 1)
    return factor


def profile_inner_products(times: Tensor, exponents: Tensor, other_times: Tensor, other_exponents: Tensor) -> Tensor:
    """Integrals of the product of two profiles over time, 1 / images, broadcast over float64 tensors of times and exponents."""
    ends, a, b = torch.minimum(times, other_times), exponents, other_exponents
    heights = (a + 1) * (b + 1) / (a + b + 1) * (ends / times) ** a * (ends / other_times) ** b
    return heights * ends / (times * other_times)


@dataclass(frozen=True)
class PosthocCombination:
    """A profile as a sum of others."""

    coefficients: tuple[float, ...]
    """Of the profiles given, in their order; they sum to one."""
    error: float
    """The distance to the profile that was asked for, relative to its norm (root of the integral of the square over time)."""

    @property
    def size(self) -> float:
        """The sum of magnitudes: by so much, at most, errors of what was kept grow."""
        return sum(map(abs, self.coefficients))


def solve_posthoc_coefficients(kept: Sequence[tuple[float, float]], width: float, images: float) -> PosthocCombination:
    """The combination of kept averages nearest to one of another width or time.

    Args:
        kept: (images, relative width) of each average that was kept, each once.
        width: relative width wanted.
        images: time wanted, at which one was kept: profiles end steeply, and one that ends between two of them is met badly.

    Raises:
        ValueError: nothing was kept, or a width that is none.
    """
    if not kept:
        raise ValueError("no power average was kept, and none can be rebuilt: train with --ema.power 0.05 0.1.")
    times = torch.tensor([time for time, _ in kept], dtype=torch.float64)
    exponents = torch.tensor([width_to_exponent(w) for _, w in kept], dtype=torch.float64)
    end, exponent = torch.tensor(float(images), dtype=torch.float64), torch.tensor(width_to_exponent(width), dtype=torch.float64)
    gram = profile_inner_products(times[:, None], exponents[:, None], times, exponents)
    norms, norm = gram.diagonal().sqrt(), profile_inner_products(end, exponent, end, exponent).sqrt()
    gram = gram / (norms[:, None] * norms)  # of profiles of unit norm
    wanted = profile_inner_products(times, exponents, end, exponent) / (norms * norm)
    masses = norm / norms  # integral of a profile of unit norm, over that of the profile wanted
    factor = torch.linalg.cholesky(gram + RIDGE * torch.eye(len(kept), dtype=torch.float64))
    free, along = torch.cholesky_solve(torch.stack([wanted, masses], dim=1), factor).T
    found = masses * (free + along * (1 - masses @ free) / (masses @ along))  # nearest of those that sum to one
    found[found.abs() < MIN_COEFFICIENT] = 0
    found[found.argmax()] += 1 - found.sum()
    unit = found / masses
    error = (unit @ gram @ unit - 2 * unit @ wanted + 1).clamp(min=0).sqrt()
    return PosthocCombination(tuple(found.tolist()), float(error))
