"""Timestep distributions: where on the path a network is trained.

A distribution is given by its quantile function, so that one uniform number per sample
decides the time, and by its density, so that an expectation under one distribution can
be weighted into one under another.
Source: docs/mathematics.md section 3; Esser et al., Scaling Rectified Flow
Transformers, section 3.1 and eq. 23 (their t is our 1 - t); Karras et al.,
table 1; Kingma et al., Variational Diffusion Models, appendix I (strata).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from condot.core.registry import Registry

from .counter_rng import Purpose, uniform
from .path import CondOT, Path


class TimestepDistribution(Protocol):
    """A distribution on (0, 1)."""

    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share `u` lies; any shape, 0 < u < 1."""
        ...

    def density(self, t: Tensor) -> Tensor:
        """Probability per unit time at `t`; any shape, 0 < t < 1."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Every time alike."""

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LogitNormal:
    """`logit(t) ~ N(mean, std^2)`: the middle of the path more often than its ends.

    Raises:
        ValueError: a standard deviation that is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf or not math.isfinite(self.mean):
            raise ValueError(
                f"mean={self.mean}, std={self.std} of the logit-normal timestep distribution: finite, std positive. "
                "Use 0 and 1, or the uniform distribution."
            )

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        return _zero_where_nan(_normal_density(torch.logit(t), self.mean, self.std) / (t * (1 - t)))


@dataclass(frozen=True)
class Mode:
    """`t = u + scale (cos^2(pi u / 2) - 1 + u)`: a bump in the middle for scale > 0, a dip for scale < 0, positive everywhere.

    Args:
        scale: -1 to 2 / (pi - 2) = 1.75, so that the quantile rises.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale={self.scale} of the mode timestep distribution: from -1 to 1.75, else times would fold. Use 1.29.")

    def quantile(self, u: Tensor) -> Tensor:
        return u + self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)

    def density(self, t: Tensor) -> Tensor:
        """One over the quantile's slope, at the share found by 60 bisections."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.quantile(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 1 / (1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * low)))


@dataclass(frozen=True)
class CosMap:
    """The distribution whose log signal-to-noise ratio on CondOT is that of a uniform time on the cosine path."""

    def quantile(self, u: Tensor) -> Tensor:
        a, b = torch.sin(math.pi / 2 * u), torch.sin(math.pi / 2 * (1 - u))
        return a / (a + b)

    def density(self, t: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


@dataclass(frozen=True)
class LogNormalSigma:
    """`log(sigma) ~ N(mean, std^2)` for the noise-to-signal ratio sigma = beta / alpha, cut to the levels the path has.

    Args:
        mean, std: of log(sigma); EDM's -1.2, 1.2 for pixels, EDM2's -0.4, 1.0 for latents.
        path: whose levels they are.
    """

    mean: float = -1.2
    std: float = 1.2
    path: Path = field(default_factory=CondOT)

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf or not math.isfinite(self.mean):
            raise ValueError(f"mean={self.mean}, std={self.std} of log(sigma): finite, std positive. Use -1.2 and 1.2.")

    def _cdf_bounds(self) -> tuple[float, float]:
        """How much of the normal distribution lies below the lowest and the highest level."""
        ends = -self.path.log_snr(torch.tensor([1.0, 0.0], dtype=torch.float64)) / 2
        low, high = torch.special.ndtr((ends - self.mean) / self.std).tolist()
        return low, high

    def quantile(self, u: Tensor) -> Tensor:
        low, high = self._cdf_bounds()
        log_sigma = self.mean + self.std * torch.special.ndtri(high - u * (high - low))
        return self.path.time_from_log_snr(-2 * log_sigma)

    def density(self, t: Tensor) -> Tensor:
        low, high = self._cdf_bounds()
        c = self.path(t)
        slope = c.da / c.a - c.db / c.b
        return _zero_where_nan(_normal_density(-self.path.log_snr(t) / 2, self.mean, self.std) * slope / (high - low))


@dataclass(frozen=True)
class Shifted:
    """Another distribution moved towards the noise: `t = t' / (t' + shift (1 - t'))`.

    On CondOT it multiplies every noise-to-signal ratio by `shift`.

    Args:
        shift: > 0; 1 is no shift. See `resolution_shift`.
        distribution: what is shifted.
    """

    shift: float = 3.0
    distribution: TimestepDistribution = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift={self.shift}: positive and finite; 1 is none. Use resolution_shift(values).")

    def quantile(self, u: Tensor) -> Tensor:
        return shift_time(self.distribution.quantile(u), self.shift)

    def density(self, t: Tensor) -> Tensor:
        back = shift_time(t, 1 / self.shift)
        return self.distribution.density(back) * self.shift / (self.shift * t + 1 - t) ** 2


@dataclass(frozen=True)
class Discrete:
    """`count` equal times from `first` to `last`, alike: DDPM's steps as they stand, NCSN's levels as Discrete(0, 1, L) on VE.

    The density is that of a uniform distribution; this one has none, but expectations
    under it stand for those of the times it samples.
    """

    first: float = 0.001
    last: float = 1.0
    count: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last <= 1 or self.count < 2:
            raise ValueError(f"{self.count} times from {self.first} to {self.last}: two or more, 0 <= first < last <= 1.")

    def quantile(self, u: Tensor) -> Tensor:
        k = (u * self.count).floor().clamp(max=self.count - 1)
        return self.first + (self.last - self.first) * (k / (self.count - 1))

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


TIMESTEP_DISTRIBUTIONS: Registry[Callable[..., TimestepDistribution]] = Registry(
    "timestep distribution",
    {
        "uniform": Uniform,
        "logit_normal": LogitNormal,
        "mode": Mode,
        "cosmap": CosMap,
        "log_normal_sigma": LogNormalSigma,
        "shifted": Shifted,
        "discrete": Discrete,
    },
)
"""Those that a recipe can name, `shifted` aside: `flow.time_shift` shifts any. A field `path` is given the recipe's."""


def shift_time(t: Tensor, shift: float) -> Tensor:
    """`t / (t + shift (1 - t))`: towards the noise for shift > 1; undone by 1 / shift."""
    return t / (t + shift * (1 - t))


def resolution_shift(values: int, base: int = 4096) -> float:
    """`sqrt(values / base)`: the shift that keeps the uncertainty about an image that repeats each of `base` values.

    Args:
        values: positions of one sample, e.g. height x width of a latent.
        base: the positions at which no shift is wanted.
    """
    if values < 1 or base < 1:
        raise ValueError(f"values={values}, base={base} of a resolution: both at least 1.")
    return math.sqrt(values / base)


def importance_weight(distribution: TimestepDistribution, t: Tensor, target: TimestepDistribution | None = None) -> Tensor:
    """Return the weight that makes a mean under `distribution` a mean under `target` (uniform unless said): the ratio of densities.

    Of t's shape and dtype, computed in float64; never not a number, and infinite only where `distribution` has no density,
    at no time it draws.
    """
    wide = t.double()
    above, below = (target or Uniform()).density(wide), distribution.density(wide)
    return torch.where(above == below, 1.0, above / below).to(t.dtype)  # both may be 0 at an end, or both infinite


MIN_TIME, MAX_TIME = 2.0**-60, 1 - 2.0**-24
"""Where a distribution with a density ends in float32: its square is still a normal number, and the largest number below 1."""


def support(distribution: TimestepDistribution) -> tuple[float, float]:
    """Return the smallest and the largest time that `sample_times` gives, float32.

    A distribution with a density has its ends with probability zero, but a time rounds
    to 1 with probability 2^-25; there a loss may have no limit. Its times are
    kept off the ends. A discrete distribution's times are what they are.
    """
    if isinstance(distribution, Discrete):
        first, last = torch.tensor([distribution.first, distribution.last]).tolist()
        return first, last
    if isinstance(distribution, Shifted) and _is_discrete(distribution.distribution):
        first, last = shift_time(torch.tensor(support(distribution.distribution), dtype=torch.float64), distribution.shift).float().tolist()
        return first, last
    return MIN_TIME, MAX_TIME


def _is_discrete(distribution: TimestepDistribution) -> bool:
    return isinstance(distribution, Discrete) or (isinstance(distribution, Shifted) and _is_discrete(distribution.distribution))


def sample_times(distribution: TimestepDistribution, seed: int, step: int, index: Tensor, batch: int | None = None) -> Tensor:
    """The time of each sample: a function of (seed, step, index) and of nothing else.

    Args:
        distribution: where to train.
        seed, step, index: as in `random`.
        batch: size of the global batch, to stratify over: then each sample's
            share u falls into a stratum of its own of width 1 / batch. Strata
            are dealt with a stride, so that neighbours get unlike times, and
            rotated by a random number in every step, so that no position is tied to a time.

    Returns:
        (B,), float32, within the distribution's `support`. Computed in float64, so that
        the rounded result does not depend on vector widths and batch sizes.

    Raises:
        ValueError: an index outside the batch that is stratified over.
    """
    u = uniform(seed, Purpose.TIME, step, index)
    if batch is not None:
        if batch < 1 or (index.device.type == "cpu" and bool(((index < 0) | (index >= batch)).any())):
            raise ValueError(
                f"stratified over {batch} samples, indices from {int(index.min())} to {int(index.max())}: all lie in [0, batch)."
            )
        rotation = uniform(seed, Purpose.TIME, step, torch.full_like(index[:1], -1))
        u = (((index * _coprime_stride(batch)) % batch + u) / batch + rotation) % 1
        u = u.clamp(2.0**-53, 1 - 2.0**-53)
    return distribution.quantile(u).float().clamp(*support(distribution))


def _coprime_stride(batch: int) -> int:
    """The number nearest above batch / golden ratio that shares no factor with it."""
    stride = max(1, round(batch * 0.6180339887))
    while math.gcd(stride, batch) != 1:
        stride += 1
    return stride


def _normal_density(x: Tensor, mean: float, std: float) -> Tensor:
    return torch.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


def _zero_where_nan(density: Tensor) -> Tensor:
    """Return a density with its limit 0 at the ends, where a normal distribution's tail meets an infinite slope: 0 times infinity."""
    return torch.where(density.isnan(), 0.0, density)
