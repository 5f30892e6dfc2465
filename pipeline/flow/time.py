"""Laws of t: where on the path a network is trained.

A law is given by its quantile function, so that one uniform number per sample
decides the time, and by its density, so that an expectation under one law can
be weighted into one under another.
Source: Esser et al., Scaling Rectified Flow Transformers, section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TimeLaw(Protocol):
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
        if not self.std > 0:
            raise ValueError(f"std={self.std} of the logit-normal law of t: it must be positive. Use 1.0, or the uniform law.")

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-(z**2) / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
