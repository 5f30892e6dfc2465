"""The discrete path of DDPM: a table of step variances, read at any time.

Noise is added in N steps, `x_k = sqrt(1 - step_variance_k) x_{k-1} + ...`, so
that after step k the signal is `alpha_k^2 = prod_{i <= k} (1 - step_variance_i)`.
Step k sits at time t = 1 - k / N: then 1000 (1 - t) is the timestep diffusers
feeds a network, without an offset. Between the steps log alpha runs linearly,
which is the variance-preserving process with a rate constant over each step;
so every solver and every conversion works on this path too. Two ends to know:
p_1 is step 0 and keeps noise sqrt(step_variance_0) = 0.01 (finish with
`denoise`); t = 0 is one step beyond the table, k = N, with the last variance
once more.
Source: Ho et al., Denoising Diffusion Probabilistic Models, section 2; Nichol
and Dhariwal, Improved DDPM, eq. 17; Rombach et al. (scaled linear).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from .path import Coefficients

VarianceSchedule = Literal["linear", "scaled_linear", "cosine"]
VARIANCE_SCHEDULES: tuple[str, ...] = get_args(VarianceSchedule)


def variance_preserving(log_alpha: Tensor, rate: Tensor) -> Coefficients:
    """Coefficients with `alpha^2 + beta^2 = 1`, from log alpha and its derivative in t; db = -inf where beta = 0."""
    a, b = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
    da = a * rate
    return Coefficients(a, b, da, -a * da / b)


def step_variances(schedule: VarianceSchedule, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """The variance each step adds, (steps,), float64.

    Args:
        schedule: `linear` in the variance, `scaled_linear` in its root, or
            `cosine`, where alpha^2 = cos^2((k / N + 0.008) / 1.008 * pi / 2),
            each variance at most 0.999.
        steps: N.
        first, last: variances of the first and last step; `cosine` has its own.

    Raises:
        ValueError: an unknown kind, variances outside (0, 1), fewer than two steps.
    """
    if schedule not in VARIANCE_SCHEDULES:
        raise ValueError(f"step variances {schedule!r} are unknown: choose one of {', '.join(VARIANCE_SCHEDULES)}.")
    if steps < 2 or not 0 < first < 1 or not 0 < last < 1:
        raise ValueError(f"steps={steps}, first={first}, last={last}: two steps or more, variances inside (0, 1). Use 1000, 1e-4, 0.02.")
    if schedule == "linear":
        return torch.linspace(first, last, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64) ** 2
    left = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - left[1:] / left[:-1]).clamp(max=0.999)


@lru_cache(maxsize=16)
def _log_alphas(schedule: VarianceSchedule, steps: int, first: float, last: float, device: torch.device) -> Tensor:
    """log alpha after steps 0 to N, (N + 1,), float64; the entry N repeats the last variance."""
    variances = step_variances(schedule, steps, first, last)
    return (torch.log1p(-torch.cat([variances, variances[-1:]])).cumsum(0) / 2).to(device)


@dataclass(frozen=True)
class DDPM:
    """alpha from a table of step variances, `beta = sqrt(1 - alpha^2)`; at t = 1 - k / N exactly diffusers' `add_noise` at timestep k.

    Args:
        variances, steps, first, last: as in `step_variances`.
    """

    variances: VarianceSchedule = "linear"  # how the variance of a step grows
    steps: int = 1000  # in the table
    first: float = 1e-4  # variance of the first step
    last: float = 0.02  # variance of the last step; cosine has its own ends

    def __post_init__(self) -> None:
        self._table(torch.device("cpu"))

    def _table(self, device: torch.device) -> Tensor:
        return _log_alphas(self.variances, self.steps, self.first, self.last, device)

    def timestep(self, t: Tensor) -> Tensor:
        """The step k nearest to `t`, int64, any shape, 0 to N - 1: t = 0 belongs to the last."""
        return torch.round((1 - t.double()) * self.steps).long().clamp(max=self.steps - 1)

    def time(self, timestep: Tensor) -> Tensor:
        """The time `1 - k / N` of a step, float64."""
        return 1 - timestep.double() / self.steps

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha and its derivative in t, float64. At a step the derivative is that of its noise side."""
        table, k = self._table(t.device), (1 - t.double()) * self.steps
        low = k.detach().floor().long().clamp(0, self.steps - 1)
        slope = table[low + 1] - table[low]
        return table[low] + (k - low) * slope, -slope * self.steps

    def __call__(self, t: Tensor) -> Coefficients:
        c = variance_preserving(*self._log_alpha(t))
        return Coefficients(*(value.to(t.dtype) for value in c))

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha = self._log_alpha(t)[0]
        return (2 * log_alpha - torch.log(-torch.expm1(2 * log_alpha))).to(t.dtype)

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        table = self._table(log_snr.device)
        log_alpha = torch.nn.functional.logsigmoid(log_snr.double()) / 2
        low = (torch.searchsorted(-table, -log_alpha.contiguous()) - 1).clamp(0, self.steps - 1)
        k = low + (log_alpha - table[low]) / (table[low + 1] - table[low])
        return (1 - k / self.steps).to(log_snr.dtype)
