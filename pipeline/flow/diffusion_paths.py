"""The paths of the diffusion literature, told in our time: t = 0 noise, t = 1 data.

Their papers run a time s = 1 - t from data to noise and name a noising process
`dx = f x ds + g dw`; here only what it leaves in x_t counts, alpha and beta.
The variance-exploding paths end at a little noise, beta_1 > 0: take their last
point through `denoise` for a clean one.
Source: docs/mathematics.md section 1; Song et al., Score-Based Generative Modeling
through SDEs, appendix B and C; Karras et al., Elucidating the Design Space of
Diffusion-Based Generative Models (EDM), table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from condot.core.registry import Registry

from .ddpm_path import DDPM, variance_preserving
from .path import Coefficients, CondOT, Cosine, Path


@dataclass(frozen=True)
class VP:
    """Variance preserving, its rate linear in s = 1 - t: `beta = sqrt(1 - alpha^2)`.

    `log alpha = -s^2 (beta_max - beta_min) / 4 - s beta_min / 2`.

    The continuous form of DDPM. alpha_0 = 0.0066, so p_0 is N(0, I) but for
    that; at t = 1 beta = 0 and its derivative is -inf, as a square root's.

    Args:
        beta_min, beta_max: the noising rate at the data and the noise end, per unit time, as Song et al. write it (our beta_t is
            the scale of the noise); 0 < beta_min < beta_max.
    """

    beta_min: float = 0.1  # noising rate at the data, per unit time
    beta_max: float = 20.0  # noising rate at the noise

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max < math.inf:
            raise ValueError(
                f"beta_min={self.beta_min}, beta_max={self.beta_max} of the path VP: 0 < beta_min < beta_max, finite. Use 0.1 and 20."
            )

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha and its derivative in t."""
        s, spread = 1 - t, self.beta_max - self.beta_min
        return -(s**2) * spread / 4 - s * self.beta_min / 2, (s * spread + self.beta_min) / 2

    def _time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """The positive root of the quadratic in s, written without cancellation."""
        depth, half = -log_alpha, self.beta_min / 2
        return 1 - 2 * depth / (half + torch.sqrt(half**2 + (self.beta_max - self.beta_min) * depth))

    def __call__(self, t: Tensor) -> Coefficients:
        return variance_preserving(*self._log_alpha(t))

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha = self._log_alpha(t)[0]
        return 2 * log_alpha - torch.log(-torch.expm1(2 * log_alpha))

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._time_of_log_alpha(torch.nn.functional.logsigmoid(log_snr) / 2)


@dataclass(frozen=True)
class SubVP(VP):
    """`alpha` of VP and `beta = 1 - alpha^2`: less noise than VP everywhere, and a finite derivative at t = 1.

    Source: Song et al., eq. 12; made for likelihood.
    """

    def __call__(self, t: Tensor) -> Coefficients:
        log_alpha, rate = self._log_alpha(t)
        a = torch.exp(log_alpha)
        return Coefficients(a, -torch.expm1(2 * log_alpha), a * rate, -2 * a**2 * rate)

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha = self._log_alpha(t)[0]
        return 2 * log_alpha - 2 * torch.log(-torch.expm1(2 * log_alpha))

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        # r = a / (1 - a^2) has the root a = tanh(asinh(2 r) / 2); the logarithm is taken without cancellation near a = 1.
        decay = torch.exp(-torch.asinh(2 * torch.exp(log_snr / 2)))
        return self._time_of_log_alpha(torch.log1p(-decay) - torch.log1p(decay))


@dataclass(frozen=True)
class VE:
    """Variance exploding: `alpha = 1, beta = sigma_min (sigma_max / sigma_min)^(1 - t)`.

    On a uniform grid of L times these are NCSN's geometric noise levels. p_0 is
    only close to N(0, sigma_max^2 I), and p_1 keeps noise of size `sigma_min`.

    Args:
        sigma_min, sigma_max: noise at t = 1 and t = 0, data units; 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01  # noise at the data end, data units
    sigma_max: float = 50.0  # noise at the noise end

    def __post_init__(self) -> None:
        _check_levels(self.sigma_min, self.sigma_max)

    def __call__(self, t: Tensor) -> Coefficients:
        growth = math.log(self.sigma_max / self.sigma_min)
        one, b = torch.ones_like(t), self.sigma_min * torch.exp(growth * (1 - t))
        return Coefficients(one, b, torch.zeros_like(t), -growth * b)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_min) + math.log(self.sigma_max / self.sigma_min) * (1 - t))

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return 1 - (-log_snr / 2 - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM:
    """`alpha = 1, beta = sigma` with `sigma^(1 / rho)` falling linearly: the grid of Karras et al. is uniform in this t.

    p_1 keeps noise of size `sigma_min`, a quarter of an 8-bit step of images in
    [-1, 1]. Comes with `precondition` and the weighting `edm`.

    Args:
        sigma_min, sigma_max: sigma at t = 1 and t = 0, data units; 0 < sigma_min < sigma_max.
        rho: how much finer the grid is at the data end; > 0.

    Source: Karras et al., eq. 5.
    """

    sigma_min: float = 0.002  # noise at the data end, data units
    sigma_max: float = 80.0  # noise at the noise end
    rho: float = 7.0  # how much finer the levels are at the data end

    def __post_init__(self) -> None:
        _check_levels(self.sigma_min, self.sigma_max)
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho={self.rho} of the EDM path: positive and finite. Use 7.")

    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def __call__(self, t: Tensor) -> Coefficients:
        low, high = self._ends()
        root = high + t * (low - high)
        return Coefficients(torch.ones_like(t), root**self.rho, torch.zeros_like(t), self.rho * root ** (self.rho - 1) * (low - high))

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(self(t).b)

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        low, high = self._ends()
        return (high - torch.exp(-log_snr / (2 * self.rho))) / (high - low)


def _check_levels(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"noise levels sigma_min={sigma_min}, sigma_max={sigma_max}: 0 < sigma_min < sigma_max, finite, in data units. "
            f"Use 0.01 and 50 for images in [-1, 1]."
        )


PATHS: Registry[Callable[[], Path]] = Registry(
    "path",
    {
        "condot": CondOT,
        "cosine": Cosine,
        "vp": VP,
        "sub_vp": SubVP,
        "ve": VE,
        "edm": EDM,
        "ddpm": DDPM,
        "ddpm_scaled_linear": partial(DDPM, "scaled_linear"),
        "ddpm_cosine": partial(DDPM, "cosine"),
    },
)
"""Every path that a recipe can name; the fields of a path's dataclass are its options."""
