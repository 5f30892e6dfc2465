"""What is known in closed form: mixtures, finite data and Gaussians on a path (docs/mathematics.md section 8).

Written from the formulas, without the code under test: a path enters only by
the numbers alpha, beta and their derivatives, given for each by hand here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """`sum_k w_k N(m_k, S_k)` in D dimensions, float64.

    Args:
        weights: (K,), sum 1.
        means: (K, D).
        covariances: (K, D, D); zeros for a finite data set.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def _parts(self, x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Responsibilities (B, K), C_k^-1 (x - a m_k) (B, K, D), log-densities with weights (B, K), and C_k."""
        c = a**2 * self.covariances + b**2 * torch.eye(self.means.shape[1], dtype=x.dtype)
        left = x[:, None] - a * self.means
        solved = torch.einsum("kij,bkj->bki", torch.linalg.inv(c), left)
        log = torch.log(self.weights) - (left * solved).sum(-1) / 2 - torch.linalg.slogdet(2 * math.pi * c)[1] / 2
        return torch.softmax(log, 1), solved, log, c

    def log_density(self, x: Tensor, a: float = 1.0, b: float = 0.0) -> Tensor:
        """log p_t, (B,)."""
        return torch.logsumexp(self._parts(x, a, b)[2], 1)

    def score(self, x: Tensor, a: float = 1.0, b: float = 0.0) -> Tensor:
        """grad log p_t, (B, D)."""
        r, solved, _, _ = self._parts(x, a, b)
        return -(r[..., None] * solved).sum(1)

    def data(self, x: Tensor, a: float, b: float) -> Tensor:
        """E[z | x_t = x], (B, D)."""
        r, solved, _, _ = self._parts(x, a, b)
        each = self.means + a * torch.einsum("kij,bkj->bki", self.covariances, solved)
        return (r[..., None] * each).sum(1)

    def noise(self, x: Tensor, a: float, b: float) -> Tensor:
        """E[eps | x_t = x]: eps and x are jointly Gaussian in each component, Cov(eps, x) = b I."""
        r, solved, _, _ = self._parts(x, a, b)
        return b * (r[..., None] * solved).sum(1)

    def velocity(self, x: Tensor, a: float, b: float, da: float, db: float) -> Tensor:
        """E[da z + db eps | x_t = x], (B, D)."""
        r, solved, _, _ = self._parts(x, a, b)
        data = self.means + a * torch.einsum("kij,bkj->bki", self.covariances, solved)
        return (r[..., None] * (da * data + db * b * solved)).sum(1)

    def field(self, coefficients):
        """The velocity as a field of (x, t) with one t for all; `coefficients` maps a float to (a, b, da, db)."""
        return lambda x, t: self.velocity(x, *coefficients(t[0].item()))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D) draws by torch's own generator."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        roots = torch.linalg.cholesky(self.covariances)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + torch.einsum("bij,bj->bi", roots[which], noise)

    def mean(self) -> Tensor:
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        centred = self.means - self.mean()
        return torch.einsum("k,kij->ij", self.weights, self.covariances + centred[:, :, None] * centred[:, None, :])

    def cdf(self, x: Tensor, axis: int) -> Tensor:
        """Distribution function of one coordinate."""
        std = torch.sqrt(self.covariances[:, axis, axis])
        return (self.weights * torch.special.ndtr((x[:, None] - self.means[:, axis]) / std)).sum(1)


def three() -> Mixture:
    """Three unlike components in the plane; every test of a marginal uses it."""
    return Mixture(
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([[-1.2, 0.4], [0.9, 1.1], [0.6, -1.3]], dtype=torch.float64),
        torch.tensor([[[0.20, 0.05], [0.05, 0.10]], [[0.08, -0.03], [-0.03, 0.15]], [[0.12, 0.0], [0.0, 0.06]]], dtype=torch.float64),
    )


def gaussian(mean: list[float], covariance: list[list[float]]) -> Mixture:
    """One normal law."""
    one = torch.ones(1, dtype=torch.float64)
    return Mixture(one, torch.tensor([mean], dtype=torch.float64), torch.tensor([covariance], dtype=torch.float64))


def finite(points: Tensor) -> Mixture:
    """A data set of equally likely points, (K, D)."""
    count, size = points.shape
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    return Mixture(weights, points, torch.zeros(count, size, size, dtype=torch.float64))


def condot(t: float) -> tuple[float, float, float, float]:
    return t, 1 - t, 1.0, -1.0


def cosine(t: float) -> tuple[float, float, float, float]:
    w = math.pi / 2
    return math.sin(w * t), math.cos(w * t), w * math.cos(w * t), -w * math.sin(w * t)


def vp(t: float) -> tuple[float, float, float, float]:
    s = 1 - t
    a = math.exp(-(s**2) * 19.9 / 4 - s * 0.1 / 2)
    b = math.sqrt(1 - a**2)
    da = a * (s * 19.9 + 0.1) / 2
    return a, b, da, -a * da / b if b else -math.inf


def sub_vp(t: float) -> tuple[float, float, float, float]:
    a, _, da, _ = vp(t)
    return a, 1 - a**2, da, -2 * a * da


def ve(t: float) -> tuple[float, float, float, float]:
    b = 0.01 * 5000 ** (1 - t)
    return 1.0, b, 0.0, -b * math.log(5000)


def edm(t: float) -> tuple[float, float, float, float]:
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    root = high + t * (low - high)
    return 1.0, root**7, 0.0, 7 * root**6 * (low - high)


BY_HAND = {"condot": condot, "cosine": cosine, "vp": vp, "sub_vp": sub_vp, "ve": ve, "edm": edm}


def kolmogorov(sample: Tensor, cdf: Tensor) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance of a sorted sample from a law with these values there.

    Above 2.0 with probability 7e-4, above 3.2 with 3e-9 (six sigma) when the sample is of that law.
    """
    n = len(sample)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((cdf - steps[:-1]).abs().max().item(), (steps[1:] - cdf).abs().max().item())
